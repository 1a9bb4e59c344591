"""The journal in Redis: one Redis Stream a stream, one script an operation.

Its keys are those of `relay.journal.redis_keys`.

The indexes of open runs are written before the run is opened. After an ending the run is put into those of
endings first and only then taken out of the former, so that whatever breaks off in between is found there.

A message of the channel `<prefix>:<db>:follow:{<stream>}` is what one operation journaled, perhaps of several
runs, or says that the stream takes no further run; an empty one is a deletion. One of the channel
`<prefix>:<db>:owner:<name>` tells a process that a run of its own is over.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

import hiredis
import orjson
from redis.exceptions import RedisError

from relay.cursor import Cursor, Extent
from relay.errors import (
    InvalidParameter,
    JournalUnavailable,
    RunExists,
    StartupError,
    StreamBusy,
    StreamSealed,
    unknown_run,
    unknown_stream,
)
from relay.frame import Event, run_started
from relay.journal import redis_scripts as scripts
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Condition,
    Delivery,
    Ended,
    EndedRun,
    Follower,
    Held,
    Opened,
    Orphan,
    Page,
    Renewal,
    RunInfo,
    RunOpening,
    RunOwner,
    RunState,
    StreamChange,
    StreamInfo,
    StreamTop,
    TakenOver,
)
from relay.journal.redis_connection import (
    Address,
    FollowLink,
    Lane,
    as_journal_error,
    error_names,
    pack,
    parse_info,
)
from relay.journal.redis_keys import KNOWN_STREAMS_MAX, Keys, member_of, named_by
from relay.journal.redis_replies import (
    frames_of,
    frames_told,
    refuse,
    refuse_errors,
    run_info,
    run_state,
    server_details,
    stream_info,
    within,
)
from relay.journal.redis_scripts import (
    Script,
    ScriptCommand,
    in_ms,
    packed_append,
    packed_bounds,
    packed_ending,
    packed_opening,
)
from relay.journal.redis_startup import check_server
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import Retention

OLDEST_SERVER = (6, 2)
TOMBSTONE_MS = 24 * 3600 * 1000
PAGE_OVERSHOOT = 2
"""A page is read without looking at sizes while it cannot exceed its bytes by more than this factor."""

ENDED_MAX = 100_000
"""Runs in the order of endings."""

LOOKED_AT_MS = 24 * 3600 * 1000
"""A run without an owner is looked at so often even if it is never due, for an ending that was not filed."""

WAITING_LOOKED_AT = 50
"""Deliveries looked at from each end of their queue, to find the one that waits longest."""

_SEALED = b"sealed"
"""What tells followers; no other message begins like it."""

# Of an ended run: when, and its member of the index.
_PLACE = re.compile(r"([0-9]{1,18}) (.+)", re.ASCII | re.DOTALL)

_MULTI = pack(b"MULTI")
_EXEC = pack(b"EXEC")
_POSITION = (b"created", b"earliest", b"last_seq", b"last_ms", b"largest")


class RedisJournal:
    """See `relay.journal.base.Journal`. `timeout_s` bounds every wait: for a connection, then for a reply."""

    def __init__(self, url: str, *, prefix: str = "relay", timeout_s: float = 5.0) -> None:
        self._url = url
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._writing: Lane | None = None
        self._reading: Lane | None = None
        self._following: FollowLink | None = None
        self._address: Address | None = None
        self._follower: Follower | None = None
        self._owner: RunOwner | None = None
        self._watched: dict[bytes, str] = {}
        self._largest: OrderedDict[str, int] = OrderedDict()
        self._keys = Keys(prefix, 0)

    # Starting and stopping.

    async def start(self, follower: Follower, owner: RunOwner | None = None) -> Sequence[Orphan]:
        try:
            address = Address(self._url)
        except (ValueError, RedisError) as error:
            raise StartupError(
                f"The journal's URL is not usable: {error}. "
                "It looks like redis://user:password@host:6379/0, rediss://… for TLS, unix:///path?db=0, or "
                "redis+sentinel://user:password@host:26379,host:26379/service/0."
            ) from None
        self._address = address
        await check_server(address, self._timeout_s)
        self._follower, self._owner = follower, owner
        self._keys = Keys(self._prefix, address.db)
        self._writing = Lane(address, "write", self._timeout_s)
        self._reading = Lane(address, "read", self._timeout_s)
        self._following = FollowLink(address, self._timeout_s, self._on_message, self._on_subscribed)
        self._watched = {self._keys.of(stream).channel: stream for stream in self._watched.values()}
        for channel in self._watched:
            self._following.subscribe(channel)
        if owner is not None:
            self._following.subscribe(self._keys.owner_channel(owner.name))
        try:
            await asyncio.gather(self._writing.open(), self._reading.open(), self._following.open())
        except TimeoutError:
            await self.close()
            raise StartupError(f"Redis at {address.name} answered, then took no more connections.") from None
        return ()

    async def close(self) -> None:
        for link in (self._following, self._reading, self._writing):
            if link is not None:
                await link.close()
        self._following = self._reading = self._writing = None

    @property
    def replaced_at(self) -> float:
        return -inf if self._address is None else self._address.replaced_at

    @property
    def reconnects(self) -> int:
        links = (self._writing, self._reading, self._following)
        return sum(max(0, link.lives - 1) for link in links if link is not None)

    async def condition(self) -> Condition:
        # Who waits longest is due either first, or last: the pauses after tries that failed grow.
        ends = (
            pack(command, self._keys.deliveries, 0, WAITING_LOOKED_AT - 1)
            for command in (b"ZRANGE", b"ZREVRANGE")
        )
        text, (seconds, micros), first, last = await self._of_each((pack(b"INFO"), pack(b"TIME"), *ends))
        info = parse_info(text)
        waiting = [named_by(member) for member in {*first, *last}]
        ended = await self._of_each(
            pack(b"HMGET", self._keys.of(stream).run(run), b"deliver", b"ended_ms") for stream, run in waiting
        )
        waiting_since = [int(ms) for delivery, ms in ended if delivery == b"pending" and int(ms)]
        return Condition(
            kind="redis",
            version=info.get("valkey_version") or info.get("redis_version", "0"),
            now_ms=int(seconds) * 1000 + int(micros) // 1000,
            waiting_since_ms=min(waiting_since, default=0),
            details=server_details(info),
        )

    # Streams.

    async def put_stream(self, stream: str, retention: Retention, change: StreamChange) -> bool:
        keys = self._keys.of(stream)
        retention_ms = None if change.retention_s is None else change.retention_s * 1000
        arguments: list[str | bytes | int] = [
            b"" if bound is None else bound for bound in (change.max_frames, change.max_bytes, retention_ms)
        ]
        arguments += [change.metadata or b"", int(change.metadata is not None)]
        arguments += [packed_bounds(retention), keys.run_prefix]
        command = scripts.PUT_STREAM.call((*keys[:5], keys.tombstone), arguments)
        listing = self._listing(stream)
        _, reply, _ = await self._together(listing, command, listing)
        created, retention_ms, *tokens = reply
        self._send(
            *(
                self._token_hint(token.decode(), stream, run.decode(), retention_ms)
                for run, token in zip(tokens[::2], tokens[1::2], strict=True)
            )
        )
        return bool(created)

    async def seal(self, stream: str) -> None:
        keys = self._keys.of(stream)
        reply = await self._script(self._writing, scripts.SEAL, (keys.meta,), (keys.channel, _SEALED))
        refuse(reply, stream)

    async def trim(self, stream: str, before_seq: int) -> None:
        refuse(
            await self._script(self._writing, scripts.TRIM, self._keys.of(stream)[:3], (before_seq,)),
            stream,
        )

    async def delete(self, stream: str) -> Sequence[str]:
        keys = self._keys.of(stream)
        arguments = (stream, keys.channel, self._keys.owner_channel(""), keys.run_prefix)
        end = packed_ending(ending(Reason.STREAM_DELETED), {})
        reply = await self._script(self._writing, scripts.DELETE, keys[:7], (*arguments, end, TOMBSTONE_MS))
        self._largest.pop(stream, None)
        gone: list[bytes] = []
        ended = []
        for run, token, owner, was_open in zip(*(reply[at::4] for at in range(4)), strict=True):
            gone.append(pack(b"UNLINK", self._keys.token(token.decode())))
            gone += self._off_indexes(stream, run.decode(), owner.decode())
            if was_open:
                ended.append(run.decode())
        self._send(*gone)
        await self._forget([stream])
        return ended

    # Runs.

    async def open_run(self, opening: RunOpening) -> Opened:
        stream, keys = opening.stream, self._keys.of(opening.stream)
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        arguments: list[str | bytes | int] = [stream, opening.run, keys.channel, self._keys.owner_channel("")]
        arguments += [_SEALED, packed_opening(opening)]
        arguments.append(run_started(opening.run, opening.dialect or None, metadata))
        arguments.append(opening.if_busy)
        arguments.append(packed_ending(ending(Reason.SUPERSEDED), opening.error_events))
        arguments += opening.supersedes
        command = scripts.OPEN_RUN.call((*keys[:5], keys.run(opening.run), keys.tombstone), arguments)
        # The hints go before the run, so that no run exists that they do not lead to, and the listing once
        # more after it, because whoever found the stream missing may have taken it off in between.
        *_, reply, _ = await self._together(*self._opening_hints(opening), command, self._listing(stream))
        match reply[0]:
            case b"run_exists":
                raise RunExists(f"The stream has a run '{opening.run}' with another writer.")
            case b"stream_sealed":
                raise StreamSealed("The stream takes no further run.")
            case b"stream_busy":
                raise StreamBusy("The stream has an open run.", open_runs=[run.decode() for run in reply[1]])
            case b"unknown_run":
                raise unknown_run(reply[1].decode())
        start, first, last = (
            Cursor(reply[1], reply[2]),
            Cursor(reply[3], reply[4]),
            Cursor(reply[5], reply[4]),
        )
        superseded, after = (tuple(names.decode().split()) for names in reply[7:9])
        if len(reply) > 9:
            for run, seq, owner, delivery in reply[9]:
                self._file(stream, run.decode(), Cursor(seq, last.ms), owner.decode(), delivery)
        else:
            for run in superseded:  # whoever asked before may not have come to file their endings
                await self.file_ending(stream, run)
        return Opened(start, first, last, superseded, reply[6], after)

    async def append(self, batch: Append) -> Appended:
        keys = self._keys.of(batch.stream)
        end = batch.ending
        arguments = packed_append(batch, keys.channel)
        reply = await self._script(self._writing, scripts.APPEND, (*keys[:5], keys.run(batch.run)), arguments)
        if reply[0] != b"ok":
            refuse(reply, batch.stream, batch.run)
        if reply[6]:
            self._send(self._token_hint(reply[6].decode(), batch.stream, batch.run, reply[7]))
        last = Cursor(reply[1], reply[2])
        if end is not None:
            self._file(batch.stream, batch.run, last, reply[8].decode(), reply[9])
        return Appended(last, reply[3], reply[4], reply[5])

    async def restore(self, opening: RunOpening, held: Held) -> None:
        keys = self._keys.of(opening.stream)
        arguments: list[str | bytes | int] = [opening.run, keys.channel, *held.first, held.producer_seq]
        arguments += [held.text_bytes, packed_opening(opening)]
        own = {} if held.error_event is None else {"": held.error_event}
        arguments.append(b"" if held.ending is None else packed_ending(held.ending, own))
        for event in held.events:
            arguments += event
        command = scripts.RESTORE.call((*keys[:5], keys.run(opening.run), keys.tombstone), arguments)
        *_, reply = await self._together(*self._opening_hints(opening), command)
        refuse(reply, opening.stream, opening.run)
        if held.ending is not None:
            await self.file_ending(opening.stream, opening.run)

    async def take_over(self, stream: str, run: str, writer: str, idle_timeout_s: float) -> TakenOver:
        keys = self._keys.of(stream)
        idle_ms = in_ms(idle_timeout_s)
        arguments = (stream, run, self._keys.owner_channel(""), writer, idle_ms)
        command = scripts.TAKE_OVER.call((keys.meta, keys.run(run)), arguments)
        _, reply = await self._together(self._due_hint(stream, run, idle_ms), command)
        refuse(reply, stream, run)
        if reply[4]:
            self._send(pack(b"SREM", self._keys.owned(reply[4].decode()), member_of(stream, run)))
        return TakenOver(reply[1], Cursor(reply[2], reply[3]))

    async def hear_of(self, stream: str, run: str, writer: str) -> RunState:
        keys = self._keys.of(stream)
        reply = await self._script(self._writing, scripts.HEAR_OF, (keys.meta, keys.run(run)), (writer,))
        return run_state(refuse(reply, stream, run)[1:])

    async def end_run(
        self, stream: str, run: str, ending: Ending, error_events: Mapping[str, Event], *, owner: str = ""
    ) -> Ended:
        keys = self._keys.of(stream)
        said = packed_ending(ending, error_events)
        arguments = (stream, run, keys.channel, self._keys.owner_channel(""), said, owner)
        reply = await self._script(self._writing, scripts.END_RUN, (*keys[:5], keys.run(run)), arguments)
        ended = None if reply[0] != b"ok" else self._ended(stream, run, reply)
        if owner and (ended is None or ended.owner != owner):
            # It was found where it does not belong, and the run does not say who else lists it there.
            self._send(pack(b"SREM", self._keys.owned(owner), member_of(stream, run)))
        if ended is None:
            refuse(reply, stream, run)
        assert ended is not None
        return ended

    async def run(self, stream: str, run: str) -> RunInfo:
        keys = self._keys.of(stream)
        packed = pack(b"HGETALL", keys.run(run)) + pack(b"EXISTS", keys.meta)
        flat, stream_exists = refuse_errors(await _lane(self._reading).submit(packed, 2))
        if not stream_exists:
            raise unknown_stream(stream)
        if not flat:
            raise unknown_run(run)
        return run_info(run, flat)

    async def runs(self, stream: str, after: str, limit: int) -> Sequence[RunInfo]:
        keys = self._keys.of(stream)
        arguments = (after, limit, keys.run_prefix)
        reply = await self._script(self._reading, scripts.RUNS, (keys.meta, keys.runs), arguments)
        _, *listed = refuse(reply, stream, after)
        return [
            run_info(run.decode(), flat) for run, flat in zip(listed[::2], listed[1::2], strict=True) if flat
        ]

    async def states(self, runs: Sequence[tuple[str, str]]) -> Sequence[RunState | None]:
        fields = (b"status", b"reason", b"writer", b"last_seq", b"last_ms")
        replies = await self._of_each(
            pack(b"HMGET", self._keys.of(stream).run(run), *fields) for stream, run in runs
        )
        return [None if reply[0] is None else run_state(reply) for reply in replies]

    # Liveness.

    async def renew(self, owner: str, lease_s: float) -> Renewal:
        lease = pack(b"SET", self._keys.owner(owner), b"1", b"PX", max(1, in_ms(lease_s)), b"GET")
        listing = pack(b"SADD", self._keys.owners, owner)
        before, (seconds, micros), _ = await self._together(lease, pack(b"TIME"), listing)
        return Renewal(before is not None, int(seconds) * 1000 + int(micros) // 1000)

    async def resign(self, owner: str) -> None:
        refuse_errors([await _lane(self._writing).submit(pack(b"UNLINK", self._keys.owner(owner)))])

    async def lapsed_owners(self) -> Sequence[str]:
        names = await self._owners()
        leases = await self._of_each(pack(b"EXISTS", self._keys.owner(name)) for name in names)
        return [name for name, held in zip(names, leases, strict=True) if not held]

    async def owned(self, owner: str, limit: int) -> Sequence[tuple[str, str]]:
        owned_key, owners_key = self._keys.owned(owner), self._keys.owners
        members, alive = await self._together(
            pack(b"SRANDMEMBER", owned_key, limit), pack(b"EXISTS", self._keys.owner(owner))
        )
        if not members and not alive:
            # Nobody needs to look here again; unless it came to own a run just now, after all.
            forget, count = pack(b"SREM", owners_key, owner), pack(b"SCARD", owned_key)
            _, came = await self._together(forget, count)
            if came:
                refuse_errors([await _lane(self._writing).submit(pack(b"SADD", owners_key, owner))])
        return [named_by(member) for member in members]

    async def due_runs(self, limit: int) -> Sequence[tuple[str, str]]:
        members = await self._script(self._reading, scripts.TAKE_DUE, (self._keys.due,), (limit, 0))
        return [named_by(member) for member in members]

    async def end_due(
        self,
        stream: str,
        run: str,
        reachable_since_ms: int,
        error_events: Mapping[Reason, Mapping[str, Event]],
    ) -> Ended | None:
        keys = self._keys.of(stream)
        arguments: list[str | bytes | int] = [stream, run, keys.channel, self._keys.owner_channel("")]
        arguments.append(reachable_since_ms)
        reasons = (Reason.IDLE_TIMEOUT, Reason.MAX_RUN)
        arguments += (packed_ending(ending(reason), error_events.get(reason, {})) for reason in reasons)
        arguments.append(LOOKED_AT_MS)
        reply = await self._script(self._writing, scripts.END_DUE, (*keys[:5], keys.run(run)), arguments)
        lane, member = _lane(self._writing), member_of(stream, run)
        match reply[0]:
            case b"ended":
                ended = self._ended(stream, run, reply)
                return ended if ended.by_this else None
            case b"due_at":
                packed = pack(b"ZADD", self._keys.due, reply[1], member)
            case _:
                packed = pack(b"ZREM", self._keys.due, member)
        refuse_errors([await lane.submit(packed)])
        return None

    async def file_ending(self, stream: str, run: str) -> None:
        fields = (b"status", b"last_seq", b"last_ms", b"deliver")
        held = await _lane(self._writing).submit(pack(b"HMGET", self._keys.of(stream).run(run), *fields))
        status, seq, ms, delivery = refuse_errors(held)
        if status == b"open":
            return
        member = member_of(stream, run)
        if status is not None:
            await self._together(*self._onto_endings(stream, run, Cursor(int(seq), int(ms)), delivery))
        # Where it is listed besides its own owner is not known: an owner may have been another's before.
        lists = [self._keys.owned(name) for name in await self._owners()]
        await self._together(
            pack(b"ZREM", self._keys.due, member), *(pack(b"SREM", key, member) for key in lists)
        )

    async def reindex(self, after: str, limit: int) -> str:
        names = await self._listed(after, limit)
        await asyncio.gather(*map(self._reindex, names))
        return names[-1] if len(names) == limit else ""

    async def ended_runs(self, ended_after_ms: int, after: str, limit: int) -> Sequence[EndedRun]:
        found: list[EndedRun] = []
        from_ms, from_member = ended_after_ms + 1, b""
        if after:
            place = _PLACE.fullmatch(after)
            if place is None:
                raise InvalidParameter("No page of ended runs ended so.", parameter="after")
            if int(place[1]) >= from_ms:
                from_ms, from_member = int(place[1]), place[2].encode()
        skipped = 0
        gone: list[bytes] = []
        while len(found) < limit:
            packed = pack(
                *(b"ZRANGEBYSCORE", self._keys.ended, from_ms, b"+inf", b"WITHSCORES"),
                *(b"LIMIT", skipped, max(limit, 100)),
            )
            (flat,) = refuse_errors([await _lane(self._reading).submit(packed)])
            if not flat:
                break
            skipped += len(flat) // 2
            listed = [
                (int(ms), member)
                for member, ms in zip(flat[::2], flat[1::2], strict=True)
                if int(ms) > from_ms or member > from_member
            ]
            while listed and len(found) < limit:
                wanted = limit - len(found)
                found += await self._ended_infos(listed[:wanted], gone)
                del listed[:wanted]
        # Only now: what is taken off lets those behind it move up, to where they would have been skipped.
        self._send(*(pack(b"ZREM", self._keys.ended, member) for member in gone))
        return found

    # Delivery of endings.

    async def claim_deliveries(self, limit: int, lease_s: float) -> Sequence[Delivery]:
        leased = (limit, max(1, in_ms(lease_s)))
        members = await self._script(self._writing, scripts.TAKE_DUE, (self._keys.deliveries,), leased)
        claimed = [named_by(member) for member in members]
        held = await self._of_each(
            pack(b"HMGET", self._keys.of(stream).run(run), b"deliver", b"status", b"tries")
            for stream, run in claimed
        )
        deliveries = []
        for (stream, run), (delivery, status, tries) in zip(claimed, held, strict=True):
            if delivery == b"pending" and status != b"open":
                deliveries.append(Delivery(stream, run, int(tries or 0)))
            else:
                self._send(pack(b"ZREM", self._keys.deliveries, member_of(stream, run)))
        return deliveries

    async def settle_delivery(self, stream: str, run: str) -> None:
        keys = self._keys.of(stream)
        settled = (keys.frames, keys.meta, keys.byte_index, keys.undelivered, keys.run(run))
        # The run first: its place in the index is looked at again as long as it is there.
        await self._script(self._writing, scripts.SETTLE_DELIVERY, settled, (run,))
        dropped = pack(b"ZREM", self._keys.deliveries, member_of(stream, run))
        refuse_errors([await _lane(self._writing).submit(dropped)])

    async def postpone_delivery(self, stream: str, run: str, delay_s: float) -> None:
        if await self._script(
            self._writing, scripts.POSTPONE_DELIVERY, (self._keys.of(stream).run(run),), ()
        ):
            later = (member_of(stream, run), in_ms(delay_s), b"CH")
            await self._script(self._writing, scripts.DUE_IN, (self._keys.deliveries,), later)

    # Reading.

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        keys = self._keys.of(stream)
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
            position, entries = refuse_errors(refuse_errors(replies)[3])
        else:
            position, entries = await self._script(
                self._reading,
                scripts.READ_BOUNDED,
                (keys.frames, keys.meta),
                (after.seq, max_frames, max_bytes),
            )
        if position[0] is None:
            self._largest.pop(stream, None)
            raise unknown_stream(stream)
        created, earliest, last_seq, last_ms, largest = map(int, position)
        self._remember_largest(stream, largest)

        anchor_ms = None
        if after.seq and entries:
            seq, ms = entries[0][0].split(b"-")
            if int(seq) == after.seq:
                anchor_ms = int(ms)
                del entries[0]
        frames = frames_of(entries[:max_frames] if len(entries) > max_frames else entries)
        if largest * len(frames) > max_bytes:
            frames = within(frames, max_bytes)
        if frames and frames[0].seq > max(after.seq + 1, earliest):
            earliest = frames[0].seq  # trimmed by somebody else's hand
        more = bool(frames) and frames[-1].seq < last_seq
        return Page(Extent(created, earliest, Cursor(last_seq, last_ms)), anchor_ms, frames, more)

    async def describe(self, stream: str) -> StreamInfo:
        info = await self._describe(stream)
        if info is None:
            raise unknown_stream(stream)
        return info

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        found: list[StreamInfo] = []
        while len(found) < limit:
            listed = await self._listed(after, limit - len(found))
            if not listed:
                break
            infos = await asyncio.gather(*map(self._describe, listed))
            found += [info for info in infos if info is not None]
            await self._forget([name for name, info in zip(listed, infos, strict=True) if info is None])
            after = listed[-1]
        return found

    async def tops(self, streams: Sequence[str]) -> Mapping[str, StreamTop]:
        replies = await self._of_each(
            pack(b"HMGET", self._keys.of(stream).meta, b"last_seq", b"last_ms", b"sealed")
            for stream in streams
        )
        return {
            stream: StreamTop(Cursor(int(seq), int(ms)), sealed == b"1")
            for stream, (seq, ms, sealed) in zip(streams, replies, strict=True)
            if seq is not None
        }

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        (held,) = refuse_errors([await _lane(self._reading).submit(pack(b"GET", self._keys.token(token)))])
        if held is None:
            return None
        stream, _, run = held.decode().partition(" ")
        packed = pack(b"HGET", self._keys.of(stream).run_prefix + run.encode(), b"token")
        (of_run,) = refuse_errors([await _lane(self._reading).submit(packed)])
        return (stream, run) if of_run == token.encode() else None

    # Following.

    def watch(self, stream: str) -> None:
        channel = self._keys.of(stream).channel
        self._watched[channel] = stream
        if self._following is not None:
            self._following.subscribe(channel)

    def unwatch(self, stream: str) -> None:
        channel = self._keys.of(stream).channel
        self._watched.pop(channel, None)
        if self._following is not None:
            self._following.unsubscribe(channel)

    async def watchers(self, stream: str) -> int:
        packed = pack(b"PUBSUB", b"NUMSUB", self._keys.of(stream).channel)
        ((_, count),) = refuse_errors([await _lane(self._reading).submit(packed)])
        return int(count)

    def _on_subscribed(self, channel: bytes) -> None:
        stream = self._watched.get(channel)
        if stream is not None and self._follower is not None:
            self._follower.on_doubt(stream)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        stream = self._watched.get(channel)
        if stream is None or self._follower is None:
            if self._owner is not None and channel == self._keys.owner_channel(self._owner.name):
                self._owner.on_run_over(*named_by(payload))
            return
        if not payload:
            self._largest.pop(stream, None)
            self._follower.on_deleted(stream)
            return
        if payload == _SEALED:
            self._follower.on_sealed(stream)
            return
        self._follower.on_frames(stream, *frames_told(payload))

    # Idempotency keys.

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        durations = (round(lease_s * 1000), round(keep_s * 1000))
        reply = await self._script(
            self._writing, scripts.CLAIM, (self._keys.claim(key),), (body_digest, owner, *durations)
        )
        return Claim(*(part.decode() for part in reply))

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        await self._script(self._writing, scripts.SETTLE, (self._keys.claim(key),), (owner, stream, run))

    async def release(self, key: str, owner: str) -> None:
        await self._script(self._writing, scripts.RELEASE, (self._keys.claim(key),), (owner,))

    # What the operations are made of.

    async def _script(
        self,
        lane: Lane | None,
        script: Script,
        keys: Sequence[bytes],
        arguments: Sequence[str | bytes | int],
    ) -> Any:
        command = script.call(keys, arguments)
        reply = await _lane(lane).submit(command.by_sha)
        if _needs_script(reply):
            reply = await _lane(lane).submit(command.by_text)
        if isinstance(reply, hiredis.ReplyError):
            raise as_journal_error(reply)
        return reply

    async def _describe(self, stream: str) -> StreamInfo | None:
        keys = self._keys.of(stream)
        reply = await self._script(self._reading, scripts.DESCRIBE, (keys.meta, keys.open, keys.runs), ())
        if not reply:
            return None
        return stream_info(stream, reply)

    async def _together(self, *parts: bytes | ScriptCommand) -> Sequence[Any]:
        """Several commands in one write; their replies. All of them are sent again when one is a script that
        the server does not know: it must do no harm to repeat them."""
        lane = _lane(self._writing)
        packed = (part if isinstance(part, bytes) else part.by_sha for part in parts)
        replies = await lane.submit(b"".join(packed), len(parts))
        replies = replies if len(parts) > 1 else [replies]
        if any(_needs_script(reply) for reply in replies):
            packed = (part if isinstance(part, bytes) else part.by_text for part in parts)
            replies = await lane.submit(b"".join(packed), len(parts))
        return refuse_errors(replies)  # type: ignore[no-any-return]

    async def _of_each(self, commands: Iterable[bytes]) -> Sequence[Any]:
        """The replies to any number of commands that read."""
        packed = list(commands)
        if not packed:
            return ()
        replies = await _lane(self._reading).submit(b"".join(packed), len(packed))
        return refuse_errors(replies if len(packed) > 1 else [replies])  # type: ignore[no-any-return]

    def _send(self, *commands: bytes) -> asyncio.Future[Any] | None:
        """Commands whose answer nobody waits for, and whose failure is of no consequence."""
        if not commands:
            return None
        try:
            answer = _lane(self._writing).submit(b"".join(commands), len(commands))
        except JournalUnavailable:
            return None
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer

    # Indexes.

    def _opening_hints(self, opening: RunOpening) -> list[bytes | ScriptCommand]:
        """What leads to a run that is going to be opened."""
        stream, run = opening.stream, opening.run
        hints: list[bytes | ScriptCommand] = [self._listing(stream)]
        hints.append(self._token_hint(opening.token, stream, run, opening.retention.retention_s * 1000))
        if opening.owner:
            # In this order: who sees no run of an owner takes it off the owners.
            hints.append(pack(b"SADD", self._keys.owned(opening.owner), member_of(stream, run)))
            hints.append(pack(b"SADD", self._keys.owners, opening.owner))
        else:
            bounds = [ms for ms in (in_ms(opening.idle_timeout_s), in_ms(opening.max_run_s)) if ms]
            hints.append(self._due_hint(stream, run, min(bounds, default=0)))
        return hints

    def _due_hint(self, stream: str, run: str, in_ms: int) -> ScriptCommand:
        delay_ms = min(in_ms, LOOKED_AT_MS) if in_ms else LOOKED_AT_MS
        return scripts.DUE_IN.call((self._keys.due,), (member_of(stream, run), delay_ms, b"LT"))

    def _ended(self, stream: str, run: str, reply: Sequence[Any]) -> Ended:
        """What a script says of an ending, which is filed whoever brought it about."""
        _, by_this, status, reason, owner, text_bytes, seq, ms, delivery = reply
        ended = Ended(bool(by_this), Status(status.decode()), reason.decode(), owner.decode(), text_bytes)
        if ended.status is not Status.OPEN:
            self._file(stream, run, Cursor(seq, ms), ended.owner, delivery)
        return ended

    def _file(self, stream: str, run: str, last: Cursor, owner: str, delivery: bytes) -> None:
        """File an ending without keeping anybody waiting: first where it has to be, and only when it is
        there off the indexes of open runs."""
        off = self._off_indexes(stream, run, owner)

        def then(filed: asyncio.Future[Any]) -> None:
            if not filed.cancelled() and filed.exception() is None:
                replies = filed.result()
                if not any(isinstance(reply, hiredis.ReplyError) for reply in replies):
                    self._send(*off)

        filed = self._send(*self._onto_endings(stream, run, last, delivery))
        if filed is not None:
            filed.add_done_callback(then)

    def _onto_endings(self, stream: str, run: str, last: Cursor, delivery: bytes) -> list[bytes]:
        member = member_of(stream, run)
        # What ended in one ms is sorted by seq, so that a stream's endings are in their order.
        commands = [pack(b"ZADD", self._keys.ended, last.ms, f"{last.seq:020d} {member}")]
        commands.append(pack(b"ZREMRANGEBYRANK", self._keys.ended, 0, -1 - ENDED_MAX))
        if delivery == b"pending":
            commands.append(pack(b"ZADD", self._keys.deliveries, b"NX", last.ms, member))
        return commands

    def _off_indexes(self, stream: str, run: str, owner: str) -> list[bytes]:
        member = member_of(stream, run)
        commands = [pack(b"ZREM", self._keys.due, member)]
        if owner:
            commands.append(pack(b"SREM", self._keys.owned(owner), member))
        return commands

    async def _owners(self) -> list[str]:
        (names,) = refuse_errors([await _lane(self._writing).submit(pack(b"SMEMBERS", self._keys.owners))])
        return [name.decode() for name in names]

    async def _reindex(self, stream: str) -> None:
        keys = self._keys.of(stream)
        exists, open_runs, undelivered = await self._of_each(
            (
                pack(b"EXISTS", keys.meta),
                *(pack(b"ZRANGE", key, 0, -1) for key in (keys.open, keys.undelivered)),
            )
        )
        if not exists:
            await self._forget([stream])  # it expired, which nobody is told of
            return
        runs = sorted({run.decode() for run in (*open_runs, *undelivered)})
        held = await self._of_each(
            pack(b"HMGET", keys.run(run), b"status", b"owner", b"last_seq", b"last_ms", b"deliver")
            for run in runs
        )
        hints: list[bytes] = []
        for run, (status, owner, seq, ms, delivery) in zip(runs, held, strict=True):
            member = member_of(stream, run)
            if status is None:
                continue
            if status != b"open":
                hints += self._onto_endings(stream, run, Cursor(int(seq), int(ms)), delivery)
            elif owner:
                hints.append(pack(b"SADD", self._keys.owned(owner.decode()), member))
                hints.append(pack(b"SADD", self._keys.owners, owner))
            else:  # who looks at it finds out when it is due
                hints.append(pack(b"ZADD", self._keys.due, b"NX", 0, member))
        if hints:
            await self._together(*hints)

    async def _ended_infos(
        self, listed: Sequence[tuple[int, bytes]], gone: list[bytes]
    ) -> Sequence[EndedRun]:
        """Of members of the listing of endings; those whose stream is gone come into `gone`."""
        names = [named_by(member.partition(b" ")[2]) for _, member in listed]
        held = await self._of_each(pack(b"HGETALL", self._keys.of(stream).run(run)) for stream, run in names)
        found = []
        for (ms, member), (stream, run), flat in zip(listed, names, held, strict=True):
            if flat:
                found.append(EndedRun(f"{ms} {member.decode()}", stream, run_info(run, flat)))
            else:
                gone.append(member)
        return found

    async def _listed(self, after: str, limit: int) -> list[str]:
        start = b"(" + after.encode() if after else b"-"
        packed = pack(b"ZRANGEBYLEX", self._keys.streams, start, b"+", b"LIMIT", 0, limit)
        (names,) = refuse_errors([await _lane(self._reading).submit(packed)])
        return [name.decode() for name in names]

    async def _forget(self, streams: Sequence[str]) -> None:
        """Take streams that are gone off the listing, and put one back that came to be meanwhile."""
        for stream in streams:
            packed = pack(b"ZREM", self._keys.streams, stream) + pack(b"EXISTS", self._keys.of(stream).meta)
            _, exists = refuse_errors(await _lane(self._writing).submit(packed, 2))
            if exists:
                refuse_errors([await _lane(self._writing).submit(self._listing(stream))])

    def _token_hint(self, token: str, stream: str, run: str, retention_ms: int) -> bytes:
        expiry: tuple[bytes | int, ...] = (b"PX", retention_ms * 11 // 10) if retention_ms else ()
        return pack(b"SET", self._keys.token(token), f"{stream} {run}", *expiry)

    def _listing(self, stream: str) -> bytes:
        return pack(b"ZADD", self._keys.streams, 0, stream)

    def _remember_largest(self, stream: str, largest: int) -> None:
        self._largest[stream] = largest
        self._largest.move_to_end(stream)
        if len(self._largest) > KNOWN_STREAMS_MAX:
            self._largest.popitem(last=False)


def _lane(lane: Lane | None) -> Lane:
    if lane is None:
        raise JournalUnavailable("The journal is not started, or closed.")
    return lane


def _needs_script(reply: Any) -> bool:
    return isinstance(reply, hiredis.ReplyError) and error_names(reply, "NOSCRIPT")
