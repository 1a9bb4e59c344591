"""The life of a run, as one table. Nothing else decides what a run may do next.

A run is opened by its first writer and stays `open` while that writer, or one that took over, appends.
It ends exactly once, and the ending says who knows about it:

- `completed`: the producer said that it is done, in a way its format calls done.
- `failed`: the producer said that it failed, or what it sent cannot be what it meant to send.
- `cancelled`: somebody who may do so stopped it.
- `lost`: nobody said anything. The ending is relay's conclusion, drawn so that no run stays open for ever.

After an ending nothing is appended, whatever the writer token: a late writer is told `run_ended` and the
terminal frame stays the last of its run. Both journals enforce this table by compare-and-set: they act on
a run only while its stored status is a state this table lets the operation start from.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

ERROR_MAX_BYTES = 4096
ERROR_CUT_MARK = " [cut]"


class Status(StrEnum):
    OPEN = "open"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


class Reason(StrEnum):
    """Stable codes of why a run ended: on the wire, in logs, in metrics."""

    UPSTREAM_END = "upstream_end"
    PRODUCER_END = "producer_end"
    INPUT_REQUIRED = "input_required"

    UPSTREAM_TRUNCATED = "upstream_truncated"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    PRODUCER_FAILED = "producer_failed"
    FRAME_TOO_LARGE = "frame_too_large"
    INVALID_FRAME = "invalid_frame"

    CLIENT_CANCEL = "client_cancel"
    SUPERSEDED = "superseded"
    UPSTREAM_CANCELLED = "upstream_cancelled"
    ABANDONED = "abandoned"
    MAX_RUN = "max_run"
    STREAM_DELETED = "stream_deleted"

    OWNER_LOST = "owner_lost"
    IDLE_TIMEOUT = "idle_timeout"
    JOURNAL_LOST = "journal_lost"
    SHUTDOWN = "shutdown"


# Reason -> the one status it belongs to.
STATUS_OF: dict[Reason, Status] = {
    Reason.UPSTREAM_END: Status.COMPLETED,
    Reason.PRODUCER_END: Status.COMPLETED,
    Reason.INPUT_REQUIRED: Status.COMPLETED,
    Reason.UPSTREAM_TRUNCATED: Status.FAILED,
    Reason.UPSTREAM_ERROR: Status.FAILED,
    Reason.UPSTREAM_TIMEOUT: Status.FAILED,
    Reason.PRODUCER_FAILED: Status.FAILED,
    Reason.FRAME_TOO_LARGE: Status.FAILED,
    Reason.INVALID_FRAME: Status.FAILED,
    Reason.CLIENT_CANCEL: Status.CANCELLED,
    Reason.SUPERSEDED: Status.CANCELLED,
    Reason.UPSTREAM_CANCELLED: Status.CANCELLED,
    Reason.ABANDONED: Status.CANCELLED,
    Reason.MAX_RUN: Status.CANCELLED,
    Reason.STREAM_DELETED: Status.CANCELLED,
    Reason.OWNER_LOST: Status.LOST,
    Reason.IDLE_TIMEOUT: Status.LOST,
    Reason.JOURNAL_LOST: Status.LOST,
    Reason.SHUTDOWN: Status.LOST,
}


class Act(StrEnum):
    """What can be asked of a run."""

    APPEND = "append"
    TAKE_OVER = "take_over"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    LOSE = "lose"


# (state, act) -> next state. A pair that is not here is refused.
TRANSITIONS: dict[tuple[Status, Act], Status] = {
    (Status.OPEN, Act.APPEND): Status.OPEN,
    (Status.OPEN, Act.TAKE_OVER): Status.OPEN,
    (Status.OPEN, Act.COMPLETE): Status.COMPLETED,
    (Status.OPEN, Act.FAIL): Status.FAILED,
    (Status.OPEN, Act.CANCEL): Status.CANCELLED,
    (Status.OPEN, Act.LOSE): Status.LOST,
}


def allowed(status: Status, act: Act) -> bool:
    """Whether a run in this state may be asked for this act."""
    return (status, act) in TRANSITIONS


class Ending(NamedTuple):
    """How a run ended. `error` is empty only for a run that completed or was cancelled without one."""

    status: Status
    reason: Reason
    error: str = ""


def ending(reason: Reason, error: str = "") -> Ending:
    """The ending a reason stands for. A failed or lost run's error is never empty, and cut at 4 KiB."""
    status = STATUS_OF[reason]
    text = error.strip()
    if not text and status in (Status.FAILED, Status.LOST):
        text = reason.value.replace("_", " ")
    encoded = text.encode(errors="replace")
    if len(encoded) > ERROR_MAX_BYTES:
        kept = encoded[: ERROR_MAX_BYTES - len(ERROR_CUT_MARK)].decode(errors="ignore")
        text = kept + ERROR_CUT_MARK
    else:
        text = encoded.decode()
    return Ending(status, reason, text)


OWNER_LOST = ending(Reason.OWNER_LOST, "The relay process that read this answer is gone.")


def diagram() -> str:
    """The table as a Mermaid state diagram, every reason beside the transition that it stands for."""
    reasons: dict[Status, list[str]] = {}
    for reason, status in STATUS_OF.items():
        reasons.setdefault(status, []).append(reason.value)
    lines = ["stateDiagram-v2", f"    [*] --> {Status.OPEN}"]
    for (before, act), after in TRANSITIONS.items():
        said = [act.value.replace("_", " "), *reasons.get(after, [])]
        lines.append(f"    {before} --> {after}: {'<br/>'.join(said)}")
    lines += [f"    {status} --> [*]" for status in reasons]
    return "\n".join(lines)
