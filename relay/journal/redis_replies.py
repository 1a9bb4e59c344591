"""What Redis and the scripts answer, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hiredis
import msgpack  # type: ignore[import-untyped]

from relay.cursor import Cursor, Extent
from relay.errors import (
    Diverged,
    Fenced,
    Rewound,
    RunEnded,
    SequenceGap,
    unknown_run,
    unknown_stream,
)
from relay.frame import Frame
from relay.journal.base import RunInfo, RunState, StreamInfo
from relay.journal.redis_connection import as_journal_error
from relay.lifecycle import Status
from relay.limits import Retention

_make = tuple.__new__
"""What `Frame()` calls, without the call: a fifth of the time of a long replay."""


class _Names(dict[bytes, str]):
    """Decodes run and event names; within a page they repeat."""

    def __missing__(self, name: bytes) -> str:
        text = self[name] = name.decode()
        return text


def refuse_errors(replies: Any) -> Any:
    """The replies unchanged; raises the journal error of the first that is an error."""
    if isinstance(replies, hiredis.ReplyError):
        raise as_journal_error(replies)
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise as_journal_error(reply)
    return replies


def refuse(reply: Any, stream: str, run: str = "") -> Any:
    """The reply of a script unchanged if it begins with `ok`; else raises what it says instead."""
    match reply[0]:
        case b"ok":
            return reply
        case b"unknown_stream":
            raise unknown_stream(stream)
        case b"unknown_run":
            raise unknown_run(run)
        case b"fenced":
            raise Fenced("The writer token is not the run's, or no longer.")
        case b"sequence_gap":
            raise SequenceGap(f"The run expects frame {reply[1]} next.", expected=reply[1])
        case b"rewound":
            raise Rewound(f"The journal has lost frames after {reply[1]}.", last_seq=reply[1])
        case b"diverged":
            raise Diverged("The journal holds other frames in their place.", last_seq=reply[1])
    assert reply[0] == b"run_ended", reply
    status, reason = reply[1].decode(), reply[2].decode()
    raise RunEnded(f"The run has ended: {status}, {reason}.", run_status=status, reason=reason)


def run_info(run: str, flat: Sequence[bytes]) -> RunInfo:
    """A run of its hash, as field, value, field and so on."""
    held = _fields(flat)
    last = Cursor(int(held["last_seq"]), int(held["last_ms"]))
    return RunInfo(
        run=run,
        status=Status(held["status"]),
        start=Cursor(int(held["start_seq"]), int(held["start_ms"])),
        last=last,
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
        owner=held["owner"],
        idle_timeout_s=int(held["idle_ms"]) / 1000,
        heard_ms=max(last.ms, int(held["heard_ms"])),
        superseded_by=held.get("superseded_by", ""),
    )


def run_state(values: Sequence[bytes]) -> RunState:
    """A run's state of its fields status, reason, writer, last_seq and last_ms."""
    status, reason, writer, seq, ms = values
    return RunState(Status(status.decode()), reason.decode(), writer.decode(), Cursor(int(seq), int(ms)))


def _number(info: Mapping[str, str], name: str) -> int | None:
    text = info.get(name, "")
    return int(text) if text.isdigit() else None


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def frames_of(entries: Sequence[Any]) -> list[Frame]:
    """The frames of a Redis Stream's entries."""
    names = _Names()
    frames = []
    for entry_id, (_, run, _, event, _, data) in entries:
        seq, _, ms = entry_id.partition(b"-")
        frames.append(_make(Frame, (int(seq), int(ms), names[run], names[event], data)))
    return frames


def within(frames: list[Frame], max_bytes: int) -> list[Frame]:
    """The first frames until their data reaches `max_bytes`; the one that reaches it is part."""
    size = 0
    for count, frame in enumerate(frames, 1):
        size += len(frame.data)
        if size >= max_bytes:
            return frames[:count]
    return frames


def frames_told(message: bytes) -> tuple[Cursor, list[Frame]]:
    """The frames that a follower is told of, and the id before the first of them."""
    previous_seq, previous_ms, ms, *flat = msgpack.unpackb(message, raw=True)
    names = _Names()
    told = [
        _make(Frame, (seq, ms, names[flat[at]], names[flat[at + 1]], flat[at + 2]))
        for seq, at in enumerate(range(0, len(flat), 3), previous_seq + 1)
    ]
    return Cursor(previous_seq, previous_ms), told


def stream_info(stream: str, reply: Sequence[Any]) -> StreamInfo:
    """A stream of which DESCRIBE tells."""
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
        active_ms=max(top.ms, int(held["created"])),
    )


def server_details(info: Mapping[str, str]) -> dict[str, Any]:
    """Of INFO what `Condition.details` holds."""
    return {
        "server": "valkey" if "valkey_version" in info else "redis",
        "memory_bytes": _number(info, "used_memory"),
        "memory_max_bytes": _number(info, "maxmemory"),
        "memory_policy": info.get("maxmemory_policy"),
        "evicted_keys": _number(info, "evicted_keys"),
        "aof": info.get("aof_enabled") == "1",
        "aof_last_write_ok": info.get("aof_last_write_status", "ok") == "ok",
        "rdb_last_save_ok": info.get("rdb_last_bgsave_status", "ok") == "ok",
        "rdb_changes_since_save": _number(info, "rdb_changes_since_last_save"),
        "rdb_last_save_ms": (_number(info, "rdb_last_save_time") or 0) * 1000,
        "uptime_s": _number(info, "uptime_in_seconds"),
        "role": info.get("role"),
        "replicas": _number(info, "connected_slaves"),
    }
