"""What the journal says of a run, as the events route shows it."""

from __future__ import annotations

from typing import Any, NamedTuple

from reading import Block, Reading
from relay_process import RelayProcess


class RunRecord(NamedTuple):
    """A run from its start to its end: its data frames, and the data of its terminal frame."""

    frames: list[Block]
    ended: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [frame.data for frame in self.frames]

    @property
    def outcome(self) -> tuple[str, str]:
        return self.ended["status"], self.ended["reason"]


def whole_run(relay: RelayProcess, stream: str, run: str = "latest") -> RunRecord:
    """Wait for a run's end; fails unless it has exactly one terminal frame, behind all others."""
    url = f"{relay.url}/relay/v1/streams/{stream}/events?run={run}&wait=60"
    while True:
        with Reading(url) as reading:
            assert reading.status == 200, reading.read()
            blocks = list(reading.blocks())
        if blocks[-1].control is None or blocks[-1].control.get("reason") != "busy":
            break  # a journal that is only just back may ask readers to come back
    journaled = [
        block
        for block in blocks
        if block.control is None or block.control["type"] in ("run.started", "run.ended")
    ]
    kinds = [None if block.control is None else block.control["type"] for block in journaled]
    assert kinds[0] == "run.started"
    assert kinds.count("run.ended") == 1
    assert kinds[-1] == "run.ended"
    ended = journaled[-1].control
    assert ended is not None
    return RunRecord([block for block in journaled if block.control is None], ended)


def run_of(relay: RelayProcess, answer: Reading) -> RunRecord:
    """The whole run that an answer came from."""
    return whole_run(relay, answer.headers["relay-stream"], answer.headers["relay-run"])
