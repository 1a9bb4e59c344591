"""What schemathesis has to know of relay beside its description. It loads this file by itself."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import schemathesis
from hypothesis import strategies as st
from schemathesis.core import NotSet

WAIT_MAX_S = 0.05

words = st.text(max_size=20)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
pushed = st.fixed_dictionaries({"data": words}, optional={"event": st.sampled_from(["", "delta", "relay"])})
frames = st.lists(pushed | pushed | anything, max_size=5)


def lines(items: list[Any]) -> bytes:
    """One item a line, as JSON. What JSON has no word for stays wrong: NaN."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def packed(items: list[Any]) -> bytes:
    """One item after another, as MessagePack."""
    return b"".join(msgpack.packb(item) for item in items)


def events(items: list[tuple[str, str]]) -> bytes:
    """Fields of server-sent events, some of them whole events."""
    return b"".join(f"{field}: {value}\n\n".encode() for field, value in items)


fields = st.tuples(st.sampled_from(["data", "event", "id", "retry", "", "other"]), words)

# A few bodies in each format are no such format at all.
schemathesis.openapi.media_type("application/x-ndjson", frames.map(lines) | st.binary(max_size=50))
schemathesis.openapi.media_type("application/msgpack", frames.map(packed) | st.binary(max_size=50))
schemathesis.openapi.media_type(
    "text/event-stream", st.lists(fields, max_size=5).map(events) | st.binary(max_size=50)
)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Have nobody wait for long; and have a run in one request say how it ends and any other run say its
    wishes in the body, which no schema can demand of some formats alone."""
    query = case.query if case.query is not None else {}
    if case.operation.definition.raw["operationId"] == "openRun":
        if case.media_type == "application/json" or isinstance(case.body, NotSet):
            query.clear()
        elif case.meta.generation.mode.is_positive:
            query["end"] = "completed"
        case.query = query
    try:
        if WAIT_MAX_S < float(query["wait"]) <= 60:
            query["wait"] = WAIT_MAX_S
    except (KeyError, TypeError, ValueError):
        pass
