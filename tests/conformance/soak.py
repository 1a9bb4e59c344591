"""Made-up requests for as long as you like: `python tests/conformance/soak.py --seconds 600 --seed 1`.

Each round asks a fresh relay on each journal, first one that anybody may use, then one with keys, with a seed
of its own that is printed before it begins. A failure prints each request to repeat.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import guarded
from conformance import api_fuzz
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream


def run_round(
    journal: str, upstream: str, folder: Path, *, keys: bool, seed: int, examples: int, longest_s: float
) -> str:
    """One round; what went wrong, "" if nothing did. One that the time runs out for is not finished."""
    options = api_fuzz.SETTINGS | (guarded.SETTINGS if keys else {})
    credential = guarded.ADMIN_KEY if keys else ""
    with RelayProcess.start(journal=journal, upstream=upstream, **options) as relay:
        try:
            outcome = api_fuzz.fuzz(relay.url, folder, seed, examples, credential, longest_s)
        except subprocess.TimeoutExpired:
            outcome = api_fuzz.Outcome(True, "")
        failed = [line for line in relay.log if "Traceback" in line or "a request failed" in line]
        alive = relay.get("/relay/healthz")[0] == 200
    wrong = [] if outcome.passed else [outcome.said]
    if failed:
        wrong += relay.log[-200:]
    if not alive:
        wrong.append("relay is not alive")
    return "\n".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="stop after about so long")
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument("--examples", type=int, default=50, help="requests an operation in a round")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    ends = time.monotonic() + options.seconds
    server = RedisServer.start()
    try:
        with ScriptedUpstream.running() as upstream:
            while True:
                for kind, keys in product(("sqlite", "redis"), (False, True)):
                    print(f"--seed {number} --examples {options.examples} ({kind}, keys: {keys})", flush=True)
                    with tempfile.TemporaryDirectory(prefix="relay-soak-") as folder:
                        journal = f"sqlite:///{folder}/relay.db" if kind == "sqlite" else server.url()
                        wrong = run_round(
                            *(journal, upstream.url, Path(folder)),
                            keys=keys,
                            seed=number,
                            examples=options.examples,
                            longest_s=max(1.0, ends - time.monotonic()),
                        )
                    if wrong:
                        print(wrong, flush=True)
                        return 1
                    if time.monotonic() > ends:
                        return 0
                number += 1
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
