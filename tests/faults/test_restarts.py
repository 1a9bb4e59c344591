"""The one process of a SQLite journal dies and comes back: runs end or go on, readers resume."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

from faults.pair import until
from faults.restarts import Lone, restarted
from faults.tally import Tally
from producing import Producer
from run_record import whole_run
from scripted_upstream import ScriptedUpstream


def test_p3_what_a_killed_process_read_ends_when_it_is_back_and_what_is_pushed_goes_on(
    tmp_path: Path, upstream: ScriptedUpstream, seed: int, tally: Tally
) -> None:
    """Once, however often it is killed: each time it finds the runs of the times before."""
    rng = Random(seed)
    with Lone(tmp_path / "relay.db", upstream) as lone:
        for _ in range(2):
            asyncio.run(restarted(lone, rng, tally))


def test_the_idle_timeout_of_a_pushed_run_counts_from_the_restart(
    tmp_path: Path, upstream: ScriptedUpstream, name: str
) -> None:
    """Nobody could be heard while nobody listened."""
    idle_timeout_s, file = 30, tmp_path / "relay.db"

    async def scene(lone: Lone) -> None:
        producer = Producer(lone.relay, name, idle_timeout_s=idle_timeout_s)
        assert producer.push("one", Relay_Seq="1").json["next_seq"] == 2
        silent = Producer(lone.relay, f"{name}-silent", idle_timeout_s=0.5)
        lone.relay.kill()
        away_for(2 * idle_timeout_s)
        await lone.restart()
        assert producer.push("two", Relay_Seq="2").json["next_seq"] == 3

        async def is_over() -> bool:
            run = lone.relay.json(f"/relay/v1/streams/{silent.stream}/runs/{silent.run}")
            return bool(run["status"] != "open")

        await until(is_over)
        assert whole_run(lone.relay, silent.stream).outcome == ("lost", "idle_timeout")
        assert silent.push("one").problem == (409, "run_ended")
        assert producer.push(end="completed").status == 200
        record = whole_run(lone.relay, name)
        assert record.outcome == ("completed", "producer_end")
        assert record.texts == ["one", "two"]

    def away_for(seconds: float) -> None:
        """Make everything that the file remembers of its runs so much older."""
        with closing(sqlite3.connect(file)) as db, db:
            for time_ms in ("started_ms", "last_ms", "heard_ms", "due_ms"):
                db.execute(f"UPDATE runs SET {time_ms} = {time_ms} - ?", (seconds * 1000,))

    with Lone(file, upstream) as lone:
        asyncio.run(scene(lone))
