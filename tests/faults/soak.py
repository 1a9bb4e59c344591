"""Faults for as long as you like: `python tests/faults/soak.py --seconds 600 --seed 1`.

Two relays on one Redis, two on one with a replica and a sentinel, and one on a SQLite file, are harmed in
every way in turn, each time at another moment; the seed of each round is printed before it begins. In the
end, and after a failure, a table says how often each fault was injected and what it cost: frames lost, frames
doubled, endings a run.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import cancels, deaths, failovers
from faults.failovers import Cluster
from faults.lost_answers import producer_retries
from faults.pair import FAST, Pair
from faults.restarts import Lone, restarted
from faults.tally import Tally
from redis_server import RedisServer
from scripted_upstream import ScriptedUpstream

SETTINGS = FAST | {"journal_timeout_s": 5, "drain_grace_s": 6}

Scene = Callable[[Random, Tally], Coroutine[Any, Any, None]]


def failovers_of(cluster: Cluster) -> list[Scene]:
    """Primaries that die, most of them alone."""
    return [
        *[partial(failovers.fail_over, cluster, plots=failovers.WRITER_LIVES)] * 3,
        partial(failovers.fail_over, cluster, plots=failovers.MEANWHILE),
        partial(failovers.fail_over, cluster, plots=failovers.WRITER_LOST, kill_owner=True),
    ]


def round_of(pair: Pair, lone: Lone, races: int) -> list[Scene]:
    """Every other fault, those that are cheap and rare more than once."""
    on_pair: list[Callable[..., Coroutine[Any, Any, None]]] = [
        *[deaths.owner_killed] * 4,
        deaths.owner_paused,
        *(partial(deaths.redis_away, outage=outage) for outage in deaths.OUTAGES),
        deaths.owner_drained,
        deaths.killed_while_draining,
        partial(cancels.races, race=cancels.with_natural_end, count=races),
        partial(cancels.races, race=cancels.with_supersede, count=races // 2),
        cancels.cancelled_twice,
        cancels.cancelled_unheard,
        cancels.cancelled_when_dead,
        cancels.resumed_and_cancelled,
        *[producer_retries] * 2,
    ]
    return [*(partial(scene, pair) for scene in on_pair), *[partial(restarted, lone)] * 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="stop after about so long")
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument("--races", type=int, default=200, help="cancels that race in a round")
    parser.add_argument("--failovers", action="store_true", help="nothing but failovers")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    tally = Tally()
    with ExitStack() as stack:
        server = RedisServer.start("--appendonly", "yes", "--appendfsync", "always")
        stack.callback(server.stop)
        upstream = stack.enter_context(ScriptedUpstream.running())
        pair = stack.enter_context(Pair.running(server, upstream, **SETTINGS))
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-soak-"))) / "relay.db"
        lone = stack.enter_context(Lone(path, upstream))
        cluster = stack.enter_context(Cluster.running(upstream))
        ends = time.monotonic() + options.seconds
        try:
            while time.monotonic() < ends:
                rng = Random(number)
                print(f"--seed {number}", flush=True)
                scenes = failovers_of(cluster)
                if not options.failovers:
                    scenes += round_of(pair, lone, options.races)
                rng.shuffle(scenes)
                for scene in scenes:
                    asyncio.run(scene(rng, tally))
                    if time.monotonic() > ends:
                        break
                number += 1
            tally.assert_clean()
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            print(tally, cluster, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
