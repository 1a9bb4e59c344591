"""relay.lifecycle: the one table of a run's life."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.lifecycle import (
    ERROR_CUT_MARK,
    ERROR_MAX_BYTES,
    STATUS_OF,
    TRANSITIONS,
    Act,
    Reason,
    Status,
    allowed,
    diagram,
    ending,
)

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"
TERMINAL = [status for status in Status if status is not Status.OPEN]
FAILURES = [reason for reason in Reason if STATUS_OF[reason] is Status.FAILED]
ROOM = ERROR_MAX_BYTES - len(ERROR_CUT_MARK)


@pytest.mark.parametrize("status", TERMINAL)
@pytest.mark.parametrize("act", Act)
def test_nothing_can_be_asked_of_a_run_that_ended(status, act):
    """P3, P4: one ending, and nothing after it."""
    assert not allowed(status, act)


@pytest.mark.parametrize("act", Act)
def test_everything_can_be_asked_of_an_open_run(act):
    assert allowed(Status.OPEN, act)


def test_no_transition_leaves_a_terminal_state():
    assert {state for state, _ in TRANSITIONS} == {Status.OPEN}


def test_every_terminal_state_is_reached_by_exactly_one_act():
    reached = [after for after in TRANSITIONS.values() if after is not Status.OPEN]
    assert sorted(reached) == sorted(TERMINAL)


def test_appending_and_taking_over_keep_a_run_open():
    assert TRANSITIONS[Status.OPEN, Act.APPEND] is Status.OPEN
    assert TRANSITIONS[Status.OPEN, Act.TAKE_OVER] is Status.OPEN


def test_the_diagram_in_the_architecture_is_drawn_from_the_table():
    assert f"```mermaid\n{diagram()}\n```" in ARCHITECTURE.read_text()


def test_the_diagram_shows_every_transition_and_every_reason():
    lines = diagram().splitlines()
    for (before, act), after in TRANSITIONS.items():
        words = act.value.replace("_", " ")
        assert any(line.strip().startswith(f"{before} --> {after}: {words}") for line in lines)
    for reason, status in STATUS_OF.items():
        assert any(f"--> {status}:" in line and reason.value in line for line in lines)


def test_every_reason_has_one_status_and_it_is_terminal():
    assert set(STATUS_OF) == set(Reason)
    assert set(STATUS_OF.values()) == set(TERMINAL)


@pytest.mark.parametrize(
    ("status", "reasons"),
    [
        ("completed", "upstream_end producer_end input_required"),
        (
            "failed",
            "upstream_truncated upstream_error upstream_timeout"
            " producer_failed frame_too_large invalid_frame",
        ),
        ("cancelled", "client_cancel superseded upstream_cancelled abandoned max_run stream_deleted"),
        ("lost", "owner_lost idle_timeout journal_lost shutdown"),
    ],
)
def test_the_reason_codes_are_those_of_the_contract(status, reasons):
    """DESIGN 3.5: stable codes on the wire, in metrics and in logs."""
    assert {reason.value for reason in Reason if STATUS_OF[reason] == status} == set(reasons.split())


@pytest.mark.parametrize("reason", Reason)
def test_an_ending_has_the_status_of_its_reason(reason):
    assert ending(reason)[:2] == (STATUS_OF[reason], reason)


@pytest.mark.parametrize("reason", FAILURES)
@pytest.mark.parametrize("error", ["", " ", "\n\t "])
def test_a_failure_never_has_an_empty_error_text(reason, error):
    assert ending(reason, error).error == reason.value.replace("_", " ")


@pytest.mark.parametrize("reason", [Reason.UPSTREAM_END, Reason.CLIENT_CANCEL])
def test_a_run_that_did_not_fail_needs_no_error_text(reason):
    assert ending(reason).error == ""
    assert ending(reason, "by the user").error == "by the user"


def test_white_space_around_an_error_text_is_dropped():
    assert ending(Reason.UPSTREAM_ERROR, "\n 401 \n").error == "401"


@pytest.mark.parametrize("text", ["x" * ERROR_MAX_BYTES, "é" * (ERROR_MAX_BYTES // 2)])
def test_an_error_text_of_just_the_bound_is_kept_whole(text):
    assert ending(Reason.UPSTREAM_ERROR, text).error == text


def test_an_error_text_one_byte_over_the_bound_is_cut_with_the_mark():
    error = ending(Reason.UPSTREAM_ERROR, "x" * (ERROR_MAX_BYTES + 1)).error
    assert error == "x" * ROOM + ERROR_CUT_MARK
    assert len(error.encode()) == ERROR_MAX_BYTES


@pytest.mark.parametrize("character", ["é", "€", "\U0001f600"])
@pytest.mark.parametrize("shift", range(4))
def test_a_cut_never_splits_a_character(character, shift):
    error = ending(Reason.UPSTREAM_ERROR, "x" * shift + character * ERROR_MAX_BYTES).error
    whole = (ROOM - shift) // len(character.encode())
    assert error == "x" * shift + character * whole + ERROR_CUT_MARK
    assert len(error.encode()) <= ERROR_MAX_BYTES


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be
@given(
    reason=st.sampled_from(Reason),
    error=st.text(st.characters(codec=None)) | st.text(min_size=1).map(lambda text: text * 5000),
)
def test_any_error_text_becomes_bounded_text_that_can_be_encoded(reason, error):
    """Also one with lone surrogates, as a JSON decoder can make them."""
    text = ending(reason, error).error
    assert len(text.encode()) <= ERROR_MAX_BYTES
    if len(error.strip().encode(errors="replace")) > ERROR_MAX_BYTES:
        assert text.endswith(ERROR_CUT_MARK)
    if reason in FAILURES:
        assert text
