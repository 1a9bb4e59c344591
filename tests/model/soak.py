"""The model test for as long as you like: `python tests/model/soak.py --seconds 600 --seed 1`.

Each round runs fresh examples on both journals with a seed of its own, printed before it begins; a failure
prints the shortest sequence of steps that was found to break a promise.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from model.backends import Backend, RedisBackend, SqliteBackend
from model.machine import Machine
from redis_server import RedisServer


def run_round(make: Callable[[], Backend], number: int, examples: int, steps: int, shrink: bool) -> None:
    machine = seed(number)(type("Machine", (Machine,), {"make_backend": staticmethod(make)}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="stop after about so long")
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument("--journal", choices=("sqlite", "redis", "both"), default="both")
    parser.add_argument("--examples", type=int, default=100, help="examples of a round")
    parser.add_argument("--steps", type=int, default=60, help="steps of an example")
    parser.add_argument("--no-shrink", action="store_true", help="print the first failure as it was found")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    logging.getLogger("relay").setLevel(logging.CRITICAL)  # it has a lot to say of what is done to it
    server = RedisServer.start()
    makers: dict[str, Callable[[], Backend]] = {
        "sqlite": SqliteBackend,
        "redis": lambda: RedisBackend(server.url()),
    }
    kinds = list(makers) if options.journal == "both" else [options.journal]
    ends = time.monotonic() + options.seconds
    try:
        while True:
            for kind in kinds:
                size = f"--examples {options.examples} --steps {options.steps}"
                print(f"--journal {kind} --seed {number} {size}", flush=True)
                try:
                    run_round(makers[kind], number, options.examples, options.steps, not options.no_shrink)
                except BaseException:
                    traceback.print_exc()
                    return 1
                if time.monotonic() > ends:
                    return 0
            number += 1
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
