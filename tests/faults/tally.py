"""What faults cost: frames lost, frames doubled, endings a run. Counted, so that a long run can show it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
from faults.listener import Listener
from relay_process import RelayProcess


class Kept(NamedTuple):
    """A frame as the journal keeps it."""

    id: str
    run: str
    event: str
    data: str

    @property
    def type(self) -> str:
        """The type of a control frame; empty for a producer's frame."""
        return str(json.loads(self.data)["type"]) if self.event == "relay" else ""


async def kept_of(sessions: aiohttp.ClientSession, relay: RelayProcess, stream: str) -> list[Kept]:
    """Every frame the journal keeps of a stream, whichever run's."""
    frames: list[Kept] = []
    after, more = "start", True
    while more:
        url = f"{relay.url}/relay/v1/streams/{stream}/events?after={after}"
        async with sessions.get(url, headers={"Accept": "application/json"}) as response:
            assert response.status == 200, await response.text()
            page = await response.json()
        frames += [Kept(each["id"], each["run"], each["event"], each["data"]) for each in page["frames"]]
        after, more = page["cursor"], page["more"]
    return frames


@dataclass
class Row:
    """What one fault cost. `endings` counts runs by how many endings they have, `reasons` by why they ended;
    `late` are frames of a run behind its ending."""

    injected: int = 0
    runs: int = 0
    frames: int = 0
    lost: int = 0
    doubled: int = 0
    late: int = 0
    endings: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.late) and set(self.endings) <= {1}


class Tally:
    """A row a fault."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def inject(self, fault: str) -> None:
        self._row(fault).injected += 1

    def _row(self, fault: str) -> Row:
        return self.rows.setdefault(fault, Row())

    def count(
        self,
        fault: str,
        kept: Sequence[Kept],
        said: Sequence[str],
        *,
        whole: Iterable[Listener] = (),
        cut: Iterable[Listener] = (),
    ) -> str:
        """Count one run: the frames the journal keeps of it, and what its producer said of which the journal
        may have taken a part only, unless the run completed.

        Listeners that are `whole` followed the run from its start to its ending, over whatever connections;
        those that were `cut` saw a part without a hole. Returns why the run ended.
        """
        row = self._row(fault)
        row.runs += 1
        ids = [frame.id for frame in kept]
        terminals = [n for n, frame in enumerate(kept) if frame.type == "run.ended"]
        row.endings[len(terminals)] += 1
        if terminals:
            row.late += len(kept) - 1 - terminals[0]
        said_at = {word: place for place, word in enumerate(said)}
        words = [frame.data for frame in kept if frame.data in said_at]
        row.frames += len(words)
        row.doubled += len(words) - len(set(words))
        reached = 1 + max((said_at[word] for word in words), default=-1)
        row.lost += reached - len(set(words))
        end = json.loads(kept[terminals[0]].data) if terminals else {"status": "open", "reason": "none"}
        if end["status"] == "completed":
            row.lost += len(set(said) - set(words))
        row.reasons[end["reason"]] += 1
        for listener in (*whole, *cut):
            shown = shown_to(listener)
            row.doubled += len(shown) - len({frame[0] for frame in shown})
            by_id = {frame.id: (frame.id, frame.event, frame.data) for frame in kept}
            assert all(by_id.get(frame[0]) == frame for frame in shown), "it was shown another frame"
            assert [frame[0] for frame in shown] == sorted((f[0] for f in shown), key=_seq), "out of order"
            row.lost += len(_holes(ids, [frame[0] for frame in shown]))
        for listener in whole:
            row.lost += len(set(ids) - {frame[0] for frame in shown_to(listener)})
        return str(end["reason"])

    def assert_clean(self) -> None:
        assert all(row.clean for row in self.rows.values()), f"\n{self}"

    def __str__(self) -> str:
        lines = [f"{'fault':44}{'times':>7}{'runs':>7}{'frames':>9}{'lost':>6}{'doubled':>9}  endings a run"]
        for fault, row in self.rows.items():
            endings = ", ".join(f"{count} in {runs} runs" for count, runs in sorted(row.endings.items()))
            late = f", {row.late} frames behind" if row.late else ""
            reasons = ", ".join(f"{count} {reason}" for reason, count in row.reasons.most_common())
            figures = f"{row.injected:7}{row.runs:7}{row.frames:9}{row.lost:6}{row.doubled:9}"
            lines.append(f"{fault:44}{figures}  {endings}{late} ({reasons})")
        return "\n".join(lines)


def shown_to(listener: Listener) -> list[tuple[str, str, str]]:
    """Id, event and data of every journaled frame that a listener was shown."""
    journaled = ("run.started", "run.ended", "run.superseded")
    return [
        (block.id.rpartition(".")[2], block.event, block.data)
        for block in listener.blocks
        if block.event != "relay" or json.loads(block.data)["type"] in journaled
    ]


def _holes(whole: Sequence[str], part: Sequence[str]) -> set[str]:
    """What is missing between the first and the last that is there."""
    there = set(part)
    places = [place for place, each in enumerate(whole) if each in there]
    return set(whole[places[0] : places[-1]]) - there if places else set()


def _seq(id_: str) -> int:
    return int(id_.partition("-")[0])
