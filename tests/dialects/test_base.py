"""What every dialect must be: pure, total, and honest about an answer that broke off."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.dialects.base import REASONING, Dialect, Signal
from relay.dialects.detect import BY_NAME
from relay.frame import Event
from relay.lifecycle import Reason, ending

DIALECTS = list(BY_NAME.values())

words = st.sampled_from(
    [
        "content_block_delta", "text_delta", "text-delta", "error", "response.failed", "response.completed",
        "response.output_text.delta", "TEXT_MESSAGE_CONTENT", "RUN_FINISHED", "RUN_ERROR", "ai", "text",
    ]
)  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "content", "refusal", "error", "message", "index", "type", "response"]
            ),
            inner | words,
        )
    ),
    max_leaves=8,
)


EVENT_NAMES = ["", "error", "messages", "messages/partial", "values", "end"]


def read_totally(dialect: Dialect, data: bytes, name: str = "") -> None:
    event = Event(name, data)
    signal = dialect.read(event)
    assert isinstance(signal, Signal)
    assert signal.text_bytes >= 0
    assert signal.error is None or isinstance(signal.error, str)
    deltas = dialect.deltas(event)
    assert all(delta.kind and delta.text and isinstance(delta.index, int | str) for delta in deltas)
    shown = [delta.text for delta in deltas if delta.kind != REASONING]
    assert signal.text_bytes == sum(len(text.encode()) for text in shown)
    assert dialect.text_bytes([event, event]) == 2 * signal.text_bytes


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@given(text=st.text())
def test_any_text_is_read_without_an_exception(dialect: Dialect, text: str) -> None:
    read_totally(dialect, text.encode(errors="replace"))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@given(value=json_values, name=st.sampled_from(EVENT_NAMES))
def test_any_json_is_read_without_an_exception(dialect: Dialect, value: object, name: str) -> None:
    read_totally(dialect, json.dumps(value).encode(errors="replace"), name)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_any_bytes_are_read_without_an_exception(dialect: Dialect) -> None:
    dialect.read(Event("", b"\xff{"))
    dialect.deltas(Event("", b"\xff{"))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("depth", [300, 2000])
def test_an_error_nested_deeper_than_json_is_written_is_read(dialect: Dialect, depth: int) -> None:
    read_totally(dialect, b'{"error":' + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("reason", [reason for reason in Reason if reason != "upstream_end"])
def test_the_event_that_says_that_an_answer_broke_off_is_read_as_an_error(
    dialect: Dialect, reason: Reason
) -> None:
    event = dialect.error_event(ending(reason))
    if event is not None:
        signal = dialect.read(event)
        assert signal.error or signal.reason is Reason.UPSTREAM_CANCELLED
        assert not dialect.deltas(event), "it is no text of the answer"
