"""relay.trace: which trace a request is of."""

from __future__ import annotations

import pytest

from relay.trace import RANDOM_BYTES, new_traceparent, trace_id_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f" 00-{TRACE}-{PARENT}-01 ",
        f"cc-{TRACE}-{PARENT}-01-more",
    ],
)
def test_a_trace_is_known_by_its_id(header: str) -> None:
    assert trace_id_of(header) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        TRACE,
        f"00-{TRACE}-{PARENT}",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\nforged",
        f"00-{TRACE}x-{PARENT}-01",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_is_of_no_trace(header: str) -> None:
    assert trace_id_of(header) == ""


def test_a_new_trace_is_valid_and_its_own() -> None:
    made = new_traceparent(bytes(range(RANDOM_BYTES)))
    assert made == "00-000102030405060708090a0b0c0d0e0f-1011121314151617-01"
    assert trace_id_of(made) == made[3:35]
