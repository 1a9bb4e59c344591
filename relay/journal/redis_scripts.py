"""The Lua files, how they are called, and what openings and endings look like to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import msgpack  # type: ignore[import-untyped]
import orjson

from relay.frame import Event
from relay.journal.base import Append, RunOpening
from relay.journal.redis_connection import pack
from relay.lifecycle import Ending
from relay.limits import Retention


class Script:
    """A Lua file, with those in front of it that hold what it shares with others."""

    def __init__(self, *names: str) -> None:
        directory = resources.files("relay.journal") / "lua"
        self.text = "".join((directory / f"{name}.lua").read_text() for name in names).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()

    def call(self, keys: Sequence[bytes], arguments: Sequence[str | bytes | int]) -> ScriptCommand:
        """A call of it."""
        return ScriptCommand(self, keys, arguments)


class ScriptCommand:
    """One call of a script."""

    def __init__(self, script: Script, keys: Sequence[bytes], arguments: Sequence[str | bytes | int]) -> None:
        self._script = script
        self._arguments = (len(keys), *keys, *arguments)

    @property
    def by_sha(self) -> bytes:
        """For a server that knows the script."""
        return pack(b"EVALSHA", self._script.sha, *self._arguments)

    @property
    def by_text(self) -> bytes:
        """For one that does not: loads and runs it in one step, so that nothing sent later by the same
        caller overtakes it."""
        return pack(b"EVAL", self._script.text, *self._arguments)


OPEN_RUN = Script("stream", "life", "open_run")
APPEND = Script("stream", "append")
RESTORE = Script("stream", "life", "restore")
TAKE_OVER = Script("take_over")
HEAR_OF = Script("hear_of")
END_RUN = Script("stream", "life", "end_run")
END_DUE = Script("stream", "life", "end_due")
PUT_STREAM = Script("stream", "life", "put_stream")
SEAL = Script("seal")
TRIM = Script("stream", "trim")
DELETE = Script("stream", "life", "delete")
DESCRIBE = Script("describe")
RUNS = Script("runs")
READ_BOUNDED = Script("read_bounded")
DUE_IN = Script("due_in")
TAKE_DUE = Script("take_due")
SETTLE_DELIVERY = Script("stream", "settle_delivery")
POSTPONE_DELIVERY = Script("postpone_delivery")
CLAIM = Script("claim")
SETTLE = Script("settle")
RELEASE = Script("release")


def in_ms(seconds: float) -> int:
    """Milliseconds, as a run's hash has them."""
    return round(seconds * 1000)


_pack = msgpack.Packer(use_bin_type=False).pack


def _packed(value: Any) -> bytes:
    packed: bytes = _pack(value)
    return packed


def _bounds(retention: Retention) -> dict[str, int]:
    return {
        "max_frames": retention.max_frames,
        "max_bytes": retention.max_bytes,
        "retention_ms": retention.retention_s * 1000,
    }


def packed_bounds(retention: Retention) -> bytes:
    """What life.lua calls an opening, as far as it says how a stream is made."""
    return _packed(_bounds(retention))


def packed_opening(opening: RunOpening) -> bytes:
    """What life.lua calls an opening."""
    values = {
        "writer": opening.writer,
        "token": opening.token,
        "dialect": opening.dialect,
        "metadata": opening.metadata,
        "answer": opening.answer,
        "owner": opening.owner,
        "idle_ms": in_ms(opening.idle_timeout_s),
        "max_run_ms": in_ms(opening.max_run_s),
        "deliver": "pending" if opening.deliver else "",
        "seal": opening.seal,
    }
    return _packed(values | _bounds(opening.retention))


def packed_ending(end: Ending, error_events: Mapping[str, Event]) -> bytes:
    """What life.lua calls an ending."""
    return _packed([end.status.value, end.reason.value, end.error, error_json(end), dict(error_events)])


def packed_append(batch: Append, channel: bytes) -> tuple[bytes, bytes]:
    """What append.lua is given: all about a batch but its frames, then those, as followers get them."""
    run, end, said = batch.run, batch.ending, None
    ended: tuple[str | bytes, ...] = ("", "", "", "")
    if end is not None:
        ended = (end.status.value, end.reason.value, end.error, error_json(end))
        said = batch.error_event
    flat: list[str | bytes | int] = [0, 0, 0]
    for event, data in batch.events if said is None else (*batch.events, said):
        flat += (run, event, data)
    about = (
        run, batch.writer, batch.producer_seq, batch.text_bytes, batch.dialect, channel, *ended, batch.answer,
        *batch.acknowledged, int(said is not None),
    )  # fmt: skip
    return _packed(about), _packed(flat)


def error_json(end: Ending) -> bytes:
    """An ending's error as it stands in `run.ended`; empty for none."""
    return orjson.dumps(end.error) if end.error else b""
