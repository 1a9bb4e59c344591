"""The journal in Redis: one Redis Stream a stream, one script an operation.

Every key of a stream carries its hash tag, and no script touches two streams, so that Redis Cluster stays
open. An entry of the Redis Stream is a frame and its id is the frame's id; everything else is derived:

    <prefix>:{<stream>}:frames     the frames: r run, e event, d data
    <prefix>:{<stream>}:meta       what stream.lua keeps of it
    <prefix>:{<stream>}:run:<run>  a run: status, writer, counters, how it ended
    <prefix>:{<stream>}:runs       every run by the seq before its first frame; `open` those not ended
    <prefix>:{<stream>}:index      sparse: cumulative data bytes up to a seq, for retention by bytes
    <prefix>:{<stream>}:tombstone  the last ms of a deleted stream, which its next life must exceed

Outside the tag, written by separate commands and never trusted without looking at the stream:

    <prefix>:streams               names, for listing
    <prefix>:token:<token>         stream and run of a resume token
    <prefix>:claim:<key>           who holds an idempotency key, and what it led to

A message of the channel `<prefix>:<db>:follow:{<stream>}` is what an append journaled, or empty for a
deletion.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import hiredis
import msgpack  # type: ignore[import-untyped]
import orjson
from redis.exceptions import RedisError

from relay.cursor import Cursor, Extent
from relay.errors import (
    Fenced,
    JournalUnavailable,
    RunEnded,
    RunExists,
    SequenceGap,
    StartupError,
    StreamSealed,
    UnknownRun,
    UnknownStream,
)
from relay.frame import Frame, run_started
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Follower,
    Opened,
    Page,
    RunInfo,
    RunOpening,
    StreamInfo,
)
from relay.journal.redis_connection import (
    Address,
    FollowLink,
    Lane,
    as_journal_error,
    error_names,
    fetch_info,
    pack,
)
from relay.lifecycle import Status
from relay.limits import Retention

OLDEST_SERVER = (6, 2)
TOMBSTONE_MS = 24 * 3600 * 1000
KNOWN_STREAMS_MAX = 10_000
"""Streams whose keys and largest frame are remembered."""

PAGE_OVERSHOOT = 2
"""A page is read without looking at sizes while it cannot exceed its bytes by more than this factor."""

_MULTI = pack(b"MULTI")
_EXEC = pack(b"EXEC")
_POSITION = (b"created", b"earliest", b"last_seq", b"last_ms", b"largest")


class _Script:
    """A Lua file, with what the operations on frames share in front of it if it needs that."""

    def __init__(self, name: str, *, on_frames: bool = False) -> None:
        directory = resources.files("relay.journal") / "lua"
        shared = (directory / "stream.lua").read_text() if on_frames else ""
        self.text = (shared + (directory / f"{name}.lua").read_text()).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()

    def command(self, keys: Sequence[bytes], arguments: Sequence[str | bytes | int]) -> _ScriptCommand:
        return _ScriptCommand(self, keys, arguments)


class _ScriptCommand:
    """One call of a script. `by_text` is for a server that does not know it: it loads and runs it in one
    step, so that nothing sent later by the same caller overtakes it."""

    def __init__(
        self, script: _Script, keys: Sequence[bytes], arguments: Sequence[str | bytes | int]
    ) -> None:
        self._script = script
        self._arguments = (len(keys), *keys, *arguments)

    @property
    def by_sha(self) -> bytes:
        return pack(b"EVALSHA", self._script.sha, *self._arguments)

    @property
    def by_text(self) -> bytes:
        return pack(b"EVAL", self._script.text, *self._arguments)


_OPEN_RUN = _Script("open_run", on_frames=True)
_APPEND = _Script("append", on_frames=True)
_TRIM = _Script("trim", on_frames=True)
_DELETE = _Script("delete")
_DESCRIBE = _Script("describe")
_READ_BOUNDED = _Script("read_bounded")
_CLAIM = _Script("claim")
_SETTLE = _Script("settle")
_RELEASE = _Script("release")


class _Keys(NamedTuple):
    frames: bytes
    meta: bytes
    byte_index: bytes
    open: bytes
    runs: bytes
    run_prefix: bytes
    tombstone: bytes
    channel: bytes


class _Names(dict[bytes, str]):
    """Decodes run and event names; within a page they repeat."""

    def __missing__(self, name: bytes) -> str:
        text = self[name] = name.decode()
        return text


class RedisJournal:
    """See `relay.journal.base.Journal`. `timeout_s` bounds every wait: for a connection, then for a reply."""

    def __init__(self, url: str, *, prefix: str = "relay", timeout_s: float = 5.0) -> None:
        self._url = url
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._db = 0
        self._writing: Lane | None = None
        self._reading: Lane | None = None
        self._following: FollowLink | None = None
        self._follower: Follower | None = None
        self._watched: dict[bytes, str] = {}
        self._largest: OrderedDict[str, int] = OrderedDict()
        self._keys = lru_cache(KNOWN_STREAMS_MAX)(self._make_keys)

    # Starting and stopping.

    async def start(self, follower: Follower) -> None:
        try:
            address = Address(self._url)
        except (ValueError, RedisError) as error:
            raise StartupError(
                f"The journal's URL is not usable: {error}. "
                "It looks like redis://user:password@host:6379/0, rediss://… for TLS, or unix:///path?db=0."
            ) from None
        _check_server(await _ask_server(address, self._timeout_s), address.name)
        self._follower = follower
        self._db = address.db
        self._keys.cache_clear()
        self._writing = Lane(address, "write", self._timeout_s)
        self._reading = Lane(address, "read", self._timeout_s)
        self._following = FollowLink(address, self._timeout_s, self._on_message, self._on_subscribed)
        self._watched = {self._keys(stream).channel: stream for stream in self._watched.values()}
        for channel in self._watched:
            self._following.subscribe(channel)
        try:
            await asyncio.gather(self._writing.open(), self._reading.open(), self._following.open())
        except TimeoutError:
            await self.close()
            raise StartupError(f"Redis at {address.name} answered, then took no more connections.") from None

    async def close(self) -> None:
        for link in (self._following, self._reading, self._writing):
            if link is not None:
                await link.close()
        self._following = self._reading = self._writing = None

    # Writing.

    async def open_run(self, opening: RunOpening) -> Opened:
        keys = self._keys(opening.stream)
        retention = opening.retention
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        arguments: list[str | bytes | int] = [opening.run, opening.writer, opening.token, opening.dialect]
        arguments += [opening.metadata, opening.answer, keys.channel]
        arguments.append(run_started(opening.run, opening.dialect or None, metadata))
        arguments += [retention.max_frames, retention.max_bytes, retention.retention_s * 1000]
        arguments.append(int(opening.seal))
        run_key = keys.run_prefix + opening.run.encode()
        command = _OPEN_RUN.command((*keys[:5], run_key, keys.tombstone), arguments)
        # The hints go before the run, so that no run exists that they do not lead to, and the listing once
        # more after it, because whoever found the stream missing may have taken it off in between.
        listing = self._listing(opening.stream)
        token = self._token_hint(opening.token, opening.stream, opening.run, retention.retention_s * 1000)
        lane = _lane(self._writing)
        replies = await lane.submit(token + listing + command.by_sha + listing, 4)
        reply = replies.pop(2)
        _refuse_errors(replies)
        if _needs_script(reply):
            reply, listed = await lane.submit(command.by_text + listing, 2)
            _refuse_errors([listed])
        if isinstance(reply, hiredis.ReplyError):
            raise as_journal_error(reply)
        if reply[0] == b"run_exists":
            raise RunExists(f"The stream has a run '{opening.run}' with another writer.")
        if reply[0] == b"stream_sealed":
            raise StreamSealed("The stream takes no further run.")
        return Opened(Cursor(reply[1], reply[2]), Cursor(reply[3], reply[4]))

    async def append(self, batch: Append) -> Appended:
        keys = self._keys(batch.stream)
        ending = batch.ending
        arguments: list[str | bytes | int] = [batch.run, batch.writer, batch.producer_seq]
        arguments += [batch.text_bytes, batch.dialect, keys.channel]
        if ending is None:
            arguments += (b"", b"", b"", b"")
        else:
            error = orjson.dumps(ending.error) if ending.error else b""
            arguments += (ending.status.value, ending.reason.value, ending.error, error)
        for event in batch.events:
            arguments += event
        reply = await self._script(
            self._writing, _APPEND, (*keys[:5], keys.run_prefix + batch.run.encode()), arguments
        )
        code = reply[0]
        if code == b"ok":
            if reply[6]:
                hint = self._token_hint(reply[6].decode(), batch.stream, batch.run, reply[7])
                _unheeded(_lane(self._writing).submit(hint))
            return Appended(Cursor(reply[1], reply[2]), reply[3], reply[4], reply[5])
        if code == b"unknown_stream":
            raise _unknown_stream(batch.stream)
        if code == b"unknown_run":
            raise _unknown_run(batch.run)
        if code == b"fenced":
            raise Fenced("The writer token is not the run's, or no longer.")
        if code == b"sequence_gap":
            raise SequenceGap(f"The run expects frame {reply[1]} next.", expected=reply[1])
        assert code == b"run_ended", reply
        status, reason = reply[1].decode(), reply[2].decode()
        raise RunEnded(f"The run has ended: {status}, {reason}.", run_status=status, reason=reason)

    async def trim(self, stream: str, before_seq: int) -> None:
        reply = await self._script(self._writing, _TRIM, self._keys(stream)[:3], (before_seq,))
        if reply[0] == b"unknown_stream":
            raise _unknown_stream(stream)

    async def delete(self, stream: str) -> None:
        keys = self._keys(stream)
        tokens = await self._script(
            self._writing, _DELETE, (*keys[:5], keys.tombstone), (keys.run_prefix, keys.channel, TOMBSTONE_MS)
        )
        self._largest.pop(stream, None)
        for token in tokens:
            _unheeded(_lane(self._writing).submit(pack(b"UNLINK", self._token_key(token.decode()))))
        await self._forget([stream])

    # Reading.

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        keys = self._keys(stream)
        wanted = max_frames + 1 if after.seq else max_frames
        largest = self._largest.get(stream)
        if largest is not None and largest * max_frames <= max_bytes * PAGE_OVERSHOOT:
            packed = (
                _MULTI
                + pack(b"HMGET", keys.meta, *_POSITION)
                + pack(b"XRANGE", keys.frames, f"{after.seq}-0", b"+", b"COUNT", wanted)
                + _EXEC
            )
            replies = await _lane(self._reading).submit(packed, 4)
            position, entries = _refuse_errors(_refuse_errors(replies)[3])
        else:
            position, entries = await self._script(
                self._reading, _READ_BOUNDED, (keys.frames, keys.meta), (after.seq, max_frames, max_bytes)
            )
        if position[0] is None:
            self._largest.pop(stream, None)
            raise _unknown_stream(stream)
        created, earliest, last_seq, last_ms, largest = map(int, position)
        self._remember_largest(stream, largest)

        anchor_ms = None
        if after.seq and entries:
            seq, ms = entries[0][0].split(b"-")
            if int(seq) == after.seq:
                anchor_ms = int(ms)
                del entries[0]
        frames = _frames(entries[:max_frames] if len(entries) > max_frames else entries)
        if largest * len(frames) > max_bytes:
            frames = _within(frames, max_bytes)
        if frames and frames[0].seq > max(after.seq + 1, earliest):
            earliest = frames[0].seq  # trimmed by somebody else's hand
        more = bool(frames) and frames[-1].seq < last_seq
        return Page(Extent(created, earliest, Cursor(last_seq, last_ms)), anchor_ms, frames, more)

    async def describe(self, stream: str) -> StreamInfo:
        info = await self._describe(stream)
        if info is None:
            raise _unknown_stream(stream)
        return info

    async def run(self, stream: str, run: str) -> RunInfo:
        keys = self._keys(stream)
        packed = pack(b"HGETALL", keys.run_prefix + run.encode()) + pack(b"EXISTS", keys.meta)
        flat, stream_exists = _refuse_errors(await _lane(self._reading).submit(packed, 2))
        if not stream_exists:
            raise _unknown_stream(stream)
        if not flat:
            raise _unknown_run(run)
        held = _fields(flat)
        return RunInfo(
            run=run,
            status=Status(held["status"]),
            start=Cursor(int(held["start_seq"]), int(held["start_ms"])),
            last=Cursor(int(held["last_seq"]), int(held["last_ms"])),
            last_data=int(held["last_data"]),
            frames=int(held["frames"]),
            text_bytes=int(held["text_bytes"]),
            started_ms=int(held["first_ms"]),
            ended_ms=int(held["ended_ms"]),
            reason=held["reason"],
            error=held["error"],
            dialect=held["dialect"],
            metadata=held["metadata"],
            answer=held["answer"],
            token=held["token"],
        )

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        found: list[StreamInfo] = []
        while len(found) < limit:
            start = b"(" + after.encode() if after else b"-"
            packed = pack(b"ZRANGEBYLEX", self._streams_key(), start, b"+", b"LIMIT", 0, limit - len(found))
            (names,) = _refuse_errors([await _lane(self._reading).submit(packed)])
            if not names:
                break
            listed = [name.decode() for name in names]
            infos = await asyncio.gather(*map(self._describe, listed))
            found += [info for info in infos if info is not None]
            await self._forget([name for name, info in zip(listed, infos, strict=True) if info is None])
            after = listed[-1]
        return found

    async def tops(self, streams: Sequence[str]) -> Mapping[str, Cursor]:
        if not streams:
            return {}
        packed = b"".join(
            pack(b"HMGET", self._keys(stream).meta, b"last_seq", b"last_ms") for stream in streams
        )
        replies = await _lane(self._reading).submit(packed, len(streams))
        replies = _refuse_errors(replies if len(streams) > 1 else [replies])
        return {
            stream: Cursor(int(seq), int(ms))
            for stream, (seq, ms) in zip(streams, replies, strict=True)
            if seq is not None
        }

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        (held,) = _refuse_errors([await _lane(self._reading).submit(pack(b"GET", self._token_key(token)))])
        if held is None:
            return None
        stream, _, run = held.decode().partition(" ")
        packed = pack(b"HGET", self._keys(stream).run_prefix + run.encode(), b"token")
        (of_run,) = _refuse_errors([await _lane(self._reading).submit(packed)])
        return (stream, run) if of_run == token.encode() else None

    # Following.

    def watch(self, stream: str) -> None:
        channel = self._keys(stream).channel
        self._watched[channel] = stream
        if self._following is not None:
            self._following.subscribe(channel)

    def unwatch(self, stream: str) -> None:
        channel = self._keys(stream).channel
        self._watched.pop(channel, None)
        if self._following is not None:
            self._following.unsubscribe(channel)

    async def watchers(self, stream: str) -> int:
        packed = pack(b"PUBSUB", b"NUMSUB", self._keys(stream).channel)
        ((_, count),) = _refuse_errors([await _lane(self._reading).submit(packed)])
        return int(count)

    def _on_subscribed(self, channel: bytes) -> None:
        stream = self._watched.get(channel)
        if stream is not None and self._follower is not None:
            self._follower.on_doubt(stream)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        stream = self._watched.get(channel)
        if stream is None or self._follower is None:
            return
        if not payload:
            self._largest.pop(stream, None)
            self._follower.on_deleted(stream)
            return
        previous_seq, previous_ms, ms, *flat = msgpack.unpackb(payload, raw=True)
        names = _Names()
        frames = [
            Frame(seq, ms, names[flat[at]], names[flat[at + 1]], flat[at + 2])
            for seq, at in enumerate(range(0, len(flat), 3), previous_seq + 1)
        ]
        self._follower.on_frames(stream, Cursor(previous_seq, previous_ms), frames)

    # Idempotency keys.

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        durations = (round(lease_s * 1000), round(keep_s * 1000))
        reply = await self._script(
            self._writing, _CLAIM, (self._claim_key(key),), (body_digest, owner, *durations)
        )
        return Claim(*(part.decode() for part in reply))

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        await self._script(self._writing, _SETTLE, (self._claim_key(key),), (owner, stream, run))

    async def release(self, key: str, owner: str) -> None:
        await self._script(self._writing, _RELEASE, (self._claim_key(key),), (owner,))

    # What the operations are made of.

    async def _script(
        self,
        lane: Lane | None,
        script: _Script,
        keys: Sequence[bytes],
        arguments: Sequence[str | bytes | int],
    ) -> Any:
        command = script.command(keys, arguments)
        reply = await _lane(lane).submit(command.by_sha)
        if _needs_script(reply):
            reply = await _lane(lane).submit(command.by_text)
        if isinstance(reply, hiredis.ReplyError):
            raise as_journal_error(reply)
        return reply

    async def _describe(self, stream: str) -> StreamInfo | None:
        keys = self._keys(stream)
        reply = await self._script(self._reading, _DESCRIBE, (keys.meta, keys.open, keys.runs), ())
        if not reply:
            return None
        held = _fields(reply[0])
        top = Cursor(int(held["last_seq"]), int(held["last_ms"]))
        return StreamInfo(
            stream=stream,
            extent=Extent(int(held["created"]), int(held["earliest"]), top),
            sealed=held["sealed"] == "1",
            open_runs=[run.decode() for run in reply[1]],
            latest_run=held["latest_run"],
            last_data=int(held["last_data"]),
            runs=reply[2],
            bytes_held=int(held["bytes"]) - int(held["trimmed"]),
            retention=Retention(
                int(held["max_frames"]), int(held["max_bytes"]), int(held["retention_ms"]) // 1000
            ),
            metadata=held["metadata"],
            active_ms=top.ms,
        )

    async def _forget(self, streams: Sequence[str]) -> None:
        """Take streams that are gone off the listing, and put one back that came to be meanwhile."""
        for stream in streams:
            packed = pack(b"ZREM", self._streams_key(), stream) + pack(b"EXISTS", self._keys(stream).meta)
            _, exists = _refuse_errors(await _lane(self._writing).submit(packed, 2))
            if exists:
                _refuse_errors([await _lane(self._writing).submit(self._listing(stream))])

    def _token_hint(self, token: str, stream: str, run: str, retention_ms: int) -> bytes:
        expiry: tuple[bytes | int, ...] = (b"PX", retention_ms * 11 // 10) if retention_ms else ()
        return pack(b"SET", self._token_key(token), f"{stream} {run}", *expiry)

    def _listing(self, stream: str) -> bytes:
        return pack(b"ZADD", self._streams_key(), 0, stream)

    def _remember_largest(self, stream: str, largest: int) -> None:
        self._largest[stream] = largest
        self._largest.move_to_end(stream)
        if len(self._largest) > KNOWN_STREAMS_MAX:
            self._largest.popitem(last=False)

    def _make_keys(self, stream: str) -> _Keys:
        base = f"{self._prefix}:{{{stream}}}"
        names = ("frames", "meta", "index", "open", "runs", "run:", "tombstone")
        channel = f"{self._prefix}:{self._db}:follow:{{{stream}}}"
        return _Keys._make([*(f"{base}:{name}".encode() for name in names), channel.encode()])

    def _streams_key(self) -> bytes:
        return f"{self._prefix}:streams".encode()

    def _token_key(self, token: str) -> bytes:
        return f"{self._prefix}:token:{token}".encode()

    def _claim_key(self, key: str) -> bytes:
        return f"{self._prefix}:claim:{key}".encode()


# Replies.


def _lane(lane: Lane | None) -> Lane:
    if lane is None:
        raise JournalUnavailable("The journal is not started, or closed.")
    return lane


def _needs_script(reply: Any) -> bool:
    return isinstance(reply, hiredis.ReplyError) and error_names(reply, "NOSCRIPT")


def _refuse_errors(replies: Any) -> Any:
    """The replies unchanged; raises the journal error of the first that is an error."""
    if isinstance(replies, hiredis.ReplyError):
        raise as_journal_error(replies)
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise as_journal_error(reply)
    return replies


def _unheeded(answer: asyncio.Future[Any]) -> None:
    """Nobody waits for this answer, and its failure is of no consequence."""
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _frames(entries: Sequence[Any]) -> list[Frame]:
    names = _Names()
    frames = []
    make = tuple.__new__  # what Frame() calls, without the call: a fifth of the time of a long replay
    for entry_id, (_, run, _, event, _, data) in entries:
        seq, _, ms = entry_id.partition(b"-")
        frames.append(make(Frame, (int(seq), int(ms), names[run], names[event], data)))
    return frames


def _within(frames: list[Frame], max_bytes: int) -> list[Frame]:
    """The first frames until their data reaches `max_bytes`; the one that reaches it is part."""
    size = 0
    for count, frame in enumerate(frames, 1):
        size += len(frame.data)
        if size >= max_bytes:
            return frames[:count]
    return frames


def _unknown_stream(stream: str) -> UnknownStream:
    return UnknownStream(f"There is no stream '{stream}'.")


def _unknown_run(run: str) -> UnknownRun:
    return UnknownRun(f"The stream has no run '{run}'.")


# Starting.


_NOT_LET_IN = ("NOAUTH", "WRONGPASS", "NOPERM", "uthentication", "no permissions", "invalid username")


async def _ask_server(address: Address, timeout_s: float) -> dict[str, str]:
    try:
        return await fetch_info(address, timeout_s)
    except (RedisError, OSError, TimeoutError) as error:
        text = (str(error) or "no answer in time").rstrip(".")
        if isinstance(error, RedisError) and any(sign in text for sign in _NOT_LET_IN):
            raise StartupError(
                f"Redis at {address.name} does not let us in: {text}. Put the user and password into the URL "
                "(redis://user:password@host:6379/0), and let the user run INFO, EVAL and the data commands."
            ) from None
        raise StartupError(
            f"Redis at {address.name} cannot be reached: {text}. Check host, port and TLS (rediss://), "
            "or use --journal sqlite:///path/to/relay.db."
        ) from None


def _check_server(info: Mapping[str, str], name: str) -> None:
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        raise StartupError(f"Redis at {name} is {version}; relay needs 6.2 or newer, or Valkey.")
    if info.get("cluster_enabled") == "1":
        raise StartupError(
            f"Redis at {name} runs in cluster mode, which relay does not speak yet. "
            "Give it a single primary, with replicas or Sentinel."
        )
    if info.get("role") == "slave":
        raise StartupError(
            f"Redis at {name} is a replica and takes no writes. Give the address of its primary."
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StartupError(
            f"Redis at {name} may evict keys (maxmemory-policy {policy}): accepted frames could "
            "vanish. Set maxmemory-policy to noeviction, or give relay a Redis of its own."
        )
