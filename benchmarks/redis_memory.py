"""What journaled frames cost in a Redis of its own, to size one: bytes of memory and of append-only file.

python -m benchmarks.redis_memory           the table of deploy/README.md
python -m benchmarks.redis_memory --quick   the same of fewer frames
"""

from __future__ import annotations

import argparse
import http.client
import secrets
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import redis

from benchmarks.processes import DEADLINE_S, Lab, Server

DATA_BYTES = (50, 200, 1000)
FRAMES = 20_000
STREAMS = 2_000
BATCH = 100


class Cost(NamedTuple):
    """Bytes that something costs: in Redis's memory, and in its append-only file."""

    memory: float
    file: float


class Store:
    """What Redis says of itself."""

    def __init__(self, server: Server) -> None:
        self._client: Any = redis.Redis(port=server.port)
        self._client.config_set("appendonly", "yes")
        self._await_file()

    def _await_file(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            told = self._client.info("persistence")
            if not told["aof_rewrite_in_progress"] and not told["aof_rewrite_scheduled"]:
                return
            if time.monotonic() > deadline:
                raise RuntimeError("Redis did not begin its append-only file")
            time.sleep(0.01)

    def sizes(self) -> Cost:
        """What is held now. MEMORY USAGE would count each node of a Redis Stream's index for 30."""
        told = self._client.info()
        # Buffers of clients come and go, and are not the journal's.
        return Cost(told["used_memory"] - told["mem_clients_normal"], told["aof_current_size"])


class Pusher:
    """An ordinary producer on one kept-alive connection."""

    def __init__(self, relay: Server) -> None:
        at = urlsplit(relay.url)
        self._connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=DEADLINE_S)

    def push(self, stream: str, frames: Iterator[bytes]) -> None:
        """One run of these data, completed."""
        opened = self._ask(f"{stream}/runs", b"{}")
        path = f"{stream}/runs/{opened['run']}/frames"
        while some := list(islice(frames, BATCH)):
            body = orjson.dumps([{"data": data.decode()} for data in some])
            self._ask(path, body, opened["writer"])
        self._ask(path + "?end=completed", b"[]", opened["writer"])

    def _ask(self, path: str, body: bytes, writer: str = "") -> Any:
        headers = {"Content-Type": "application/json"} | ({"Relay-Writer": writer} if writer else {})
        self._connection.request("POST", f"/relay/v1/streams/{path}", body, headers)
        response = self._connection.getresponse()
        said = response.read()
        if response.status not in (200, 201):
            raise RuntimeError(f"{path}: {response.status} {said[:200]!r}")
        return orjson.loads(said)


def between(before: Cost, after: Cost, number: int) -> Cost:
    """What one of so many cost."""
    return Cost((after.memory - before.memory) / number, (after.file - before.file) / number)


def of_a_frame(store: Store, pusher: Pusher, data_bytes: int, frames: int) -> Cost:
    """A frame of a long stream."""
    before = store.sizes()
    pusher.push(f"of-{data_bytes}", (secrets.token_hex(data_bytes // 2).encode() for _ in range(frames)))
    return between(before, store.sizes(), frames)


def of_a_stream(store: Store, pusher: Pusher, streams: int) -> Cost:
    """A stream with one run of one frame."""
    before = store.sizes()
    for number in range(streams):
        pusher.push(f"conversation-{number:08}", iter([b"x" * 50]))
    return between(before, store.sizes(), streams)


def measure(quick: bool) -> dict[str, Cost]:
    """What each costs, by its name in the table."""
    frames, streams = (2_000, 100) if quick else (FRAMES, STREAMS)
    found = {}
    with Lab.open() as lab:
        server = lab.redis()
        pusher, store = Pusher(lab.relay(server.url, "")), Store(server)
        pusher.push("warm", iter([b"x"] * BATCH))
        for data_bytes in DATA_BYTES:
            found[f"a frame of {data_bytes:,} bytes"] = of_a_frame(store, pusher, data_bytes, frames)
        found["a stream with one run, one frame of 50 bytes in it"] = of_a_stream(store, pusher, streams)
    return found


def table(found: dict[str, Cost]) -> str:
    """As README.md has it."""
    lines = ["| | memory, bytes | append-only file, bytes |", "|---|---|---|"]
    lines += [f"| {name} | {cost.memory:,.0f} | {cost.file:,.0f} |" for name, cost in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    print(table(measure(parser.parse_args().quick)))


if __name__ == "__main__":
    main()
