"""The one process of a SQLite journal dies and comes back: runs end or go on, readers resume."""

from __future__ import annotations

import asyncio
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
    idle_timeout_s = 2.5

    async def scene(lone: Lone) -> None:
        producer = Producer(lone.relay, name, idle_timeout_s=idle_timeout_s)
        assert producer.push("one", Relay_Seq="1").json["next_seq"] == 2
        lone.relay.kill()
        await asyncio.sleep(idle_timeout_s)  # away for as long as it may be silent
        await lone.restart()
        assert producer.push("two", Relay_Seq="2").json["next_seq"] == 3

        async def is_over() -> bool:
            run = lone.relay.json(f"/relay/v1/streams/{name}/runs/{producer.run}")
            return bool(run["status"] != "open")

        await until(is_over)
        record = whole_run(lone.relay, name)
        assert record.outcome == ("lost", "idle_timeout")
        assert record.texts == ["one", "two"]
        assert producer.push("three", Relay_Seq="3").problem == (409, "run_ended")

    with Lone(tmp_path / "relay.db", upstream) as lone:
        asyncio.run(scene(lone))
