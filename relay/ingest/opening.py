"""How a run is opened, whoever produces it, and what is told of the runs that it supersedes."""

from __future__ import annotations

import asyncio
import logging

from relay.dialects.detect import error_events
from relay.errors import JournalUnavailable
from relay.ingest.owned import OnEnded
from relay.journal.base import Journal, Opened, RunOpening
from relay.lifecycle import Reason, ending

log = logging.getLogger("relay.run")

SUPERSEDED = ending(Reason.SUPERSEDED)

SAID_OF_SUPERSEDED = error_events(SUPERSEDED)
"""For `RunOpening.error_events`."""


async def open_run(journal: Journal, opening: RunOpening, timeout_s: float, on_ended: OnEnded) -> Opened:
    """Open a run, and ask once more if a connection broke under the question; count the runs that it ended,
    and warn of what stays behind them. `timeout_s` is how long the journal is waited for. Raises what
    `Journal.open_run` does."""
    now = asyncio.get_running_loop().time
    asked_at = now()
    try:
        opened = await journal.open_run(opening)
    except JournalUnavailable:
        if now() - asked_at > timeout_s / 2:
            raise  # no blip: the client has waited long enough
        opened = await journal.open_run(opening)
    for run in opened.ended:
        on_ended(opening.stream, run, SUPERSEDED, 0, None)
    if opened.frames_after:
        log.warning(
            "stream=%s run=%s supersedes %s: %d frames of other runs (%s) stand at or after the start of the "
            "first superseded run; they are not rolled back",
            opening.stream, opening.run, ", ".join(opened.superseded), opened.frames_after,
            ", ".join(opened.runs_after),
        )  # fmt: skip
    return opened
