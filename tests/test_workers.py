"""relay.workers: several processes on one port, seen from outside as one relay."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from held_port import hold_port
from reading import DEADLINE_S, Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream
from test_cli import refusal

from relay import workers
from relay.errors import StartupError
from relay.settings import Settings
from relay.workers import Supervisor

COUNT = 2


class Asking(Reading):
    """A request to one of the workers."""

    def __init__(
        self,
        relay: RelayProcess,
        worker: int,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        **headers: str,
    ) -> None:
        self._worker = worker
        super().__init__(relay.url + path, method, body, **headers)

    def _connect(self, host: str, port: int) -> http.client.HTTPConnection:
        """The kernel deals connections; one that went to another worker is closed again."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            connection = super()._connect(host, port)
            with contextlib.suppress(ConnectionError):
                connection.request("GET", "/relay/healthz")
                if json.loads(connection.getresponse().read())["worker"] == self._worker:
                    return connection
            connection.close()
        raise AssertionError(f"no connection came to worker {self._worker}")


def answer(relay: RelayProcess, worker: int, path: str, method: str = "GET", **headers: str) -> Any:
    """A whole answer of one worker, which is JSON."""
    with Asking(relay, worker, path, method, **headers) as asking:
        assert asking.status == 200, asking.read()
        return json.loads(asking.read())


def metrics(relay: RelayProcess, worker: int) -> dict[str, float]:
    """What a worker tells to a scrape, by the name of the line."""
    with Asking(relay, worker, "/relay/metrics") as asking:
        lines = asking.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def told_by_all(ask: Callable[[], Any]) -> Any:
    """Diagnostics in which every worker has its say: one that is slow to answer another is left out."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        told = ask()
        if all(entry["answers"] for entry in told["workers"]):
            return told
        assert time.monotonic() < deadline, told["workers"]


def pids(relay: RelayProcess) -> dict[int, int]:
    """Process ids by worker number."""
    told = told_by_all(lambda: relay.json("/relay/v1/diagnostics"))
    return {entry["worker"]: entry["pid"] for entry in told["workers"]}


def await_metrics(relay: RelayProcess, worker: int, **values: float) -> None:
    """Ask again until a worker tells these figures: of the others it knows what they wrote down last."""
    deadline = time.monotonic() + DEADLINE_S
    while not values.items() <= (told := metrics(relay, worker)).items():
        assert time.monotonic() < deadline, {name: told.get(name) for name in values}


def push(relay: RelayProcess, worker: int, stream: str) -> None:
    """A whole run, pushed through one worker."""
    path = f"/relay/v1/streams/{stream}/runs?end=completed"
    kind = {"Content_Type": "application/x-ndjson"}
    with Asking(relay, worker, path, "POST", b'{"data":"one"}\n', **kind) as asking:
        assert asking.status == 201, asking.read()


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it holds: what another process says, it says when it comes to it."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process, which need not be our child, is there and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def held(upstream: ScriptedUpstream, path: str) -> Gate:
    """An agent that says a word each time it is let pass, then ends."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for word in ("one", "two", "three"):
            await exchange.chunk(f"data: {word}\n\n".encode())
            await gate.wait()
        await exchange.end()

    upstream.on(path, handler)
    return gate


@contextlib.contextmanager
def started(redis_server: RedisServer, upstream: ScriptedUpstream, **settings: Any) -> Iterator[RelayProcess]:
    """A relay of several workers that a test may harm."""
    with RelayProcess.start(
        journal=redis_server.url(), upstream=upstream.url, workers=COUNT, **settings
    ) as relay:
        yield relay


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    with started(redis_server, upstream) as relay:
        yield relay


# One relay to its clients


def test_it_is_said_once_that_all_workers_serve(pair: RelayProcess) -> None:
    assert len([line for line in pair.log if "is ready" in line]) == 1
    assert {answer(pair, worker, "/relay/readyz")["status"] for worker in (1, 2)} == {"ready"}
    assert len(set(pids(pair).values()) - {pair.pid}) == COUNT


def test_p2_a_client_resumes_at_another_worker(
    pair: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held(upstream, f"/{name}")
    with Asking(pair, 1, f"/{name}") as page:
        (first,) = page.take(1)
    with Asking(pair, 2, f"/{name}", Last_Event_ID=first.id) as page:
        gate.open()
        assert [block.data for block in page.blocks()] == ["two", "three"]
    assert upstream.calls(f"/{name}") == 1


def test_p7_a_run_is_cancelled_at_a_worker_that_does_not_own_it(
    pair: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    closed = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await exchange.closed()
        closed.pass_one()
        await closed.wait()

    upstream.on(f"/{name}", handler)
    with Asking(pair, 1, f"/{name}", Relay_Stream=name) as page:
        page.take(1)
        ended = answer(pair, 2, f"/relay/v1/streams/{name}/cancel", "POST")
        assert (ended["status"], ended["reason"]) == ("cancelled", "client_cancel")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            page.read()
    closed.await_arrival()


def test_an_idempotency_key_joins_a_run_of_another_worker(
    pair: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held(upstream, f"/{name}")
    with (
        Asking(pair, 1, f"/{name}", "POST", Idempotency_Key=name) as first,
        Asking(pair, 2, f"/{name}", "POST", Idempotency_Key=name) as second,
    ):
        gate.open()
        said = [[block.data for block in page.blocks()] for page in (first, second)]
    assert said == [["one", "two", "three"]] * 2
    assert upstream.calls(f"/{name}") == 1


# What they tell of themselves


def test_metrics_are_of_all_workers_whichever_is_asked(
    pair: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    ended = 'relay_runs_ended_total{reason="producer_end",status="completed"}'
    before = metrics(pair, 1)
    gate = held(upstream, f"/{name}")
    events = f"/relay/v1/streams/{name}/events?after=tail"
    with contextlib.ExitStack() as open_until_the_end:
        for worker, times in ((1, 2), (2, 3)):
            for _ in range(times):
                push(pair, worker, name)
            page = open_until_the_end.enter_context(Asking(pair, worker, events))
            page.take(1)
        page = open_until_the_end.enter_context(Asking(pair, 1, f"/{name}"))
        page.take(1)
        for worker in (1, 2):
            await_metrics(pair, worker, relay_readers_open=3, relay_runs_open=1, relay_journal_up=1)
            told = metrics(pair, worker)
            assert told[ended] - before.get(ended, 0) == 5
            assert told["relay_workers"] == COUNT
        gate.open()
        page.read()
    await_metrics(pair, 2, relay_readers_open=0)
    await_metrics(pair, 1, relay_runs_open=0)


def test_diagnostics_are_of_all_workers_whichever_is_asked(
    pair: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held(upstream, f"/{name}")
    with (
        Asking(pair, 1, f"/{name}", Relay_Stream=name) as first,
        Asking(pair, 2, f"/{name}", Relay_Stream=name) as second,
    ):
        first.take(1)
        second.take(1)
        for asked in (1, 2):
            told = told_by_all(lambda asked=asked: answer(pair, asked, "/relay/v1/diagnostics"))
            for kind in ("open_runs", "readers"):
                ours = [entry["worker"] for entry in told[kind] if entry["stream"] == name]
                assert sorted(ours) == [1, 2]
            assert [entry["worker"] for entry in told["workers"]] == [1, 2]
        gate.open()
        first.read()
        second.read()

    def both_ended() -> bool:
        told = answer(pair, 1, "/relay/v1/diagnostics")
        return sorted(entry["worker"] for entry in told["ended_runs"] if entry["stream"] == name) == [1, 2]

    until(both_ended)  # a reader may see the end before the owner has noted it


# Deaths and ends


def test_p3_a_killed_worker_is_replaced_and_its_runs_end_and_nothing_is_forgotten(
    redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    held(upstream, f"/{name}")
    # By themselves on their Redis: a reaper of other relays there might end the run, and count it.
    settings = {"owner_lease_s": 0.9, "journal_timeout_s": 2, "redis_prefix": name}
    with started(redis_server, upstream, **settings) as relay:
        push(relay, 1, f"{name}-pushed")
        events = f"/relay/v1/streams/{name}/events"
        with (
            Asking(relay, 1, f"/{name}", Relay_Stream=name) as cut,
            Asking(relay, 2, f"{events}?control=events") as reading,
        ):
            cut.take(1)
            killed = pids(relay)[1]
            os.kill(killed, signal.SIGKILL)
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                cut.read()
            ended = next(block.control for block in reading.blocks() if (block.control or {}).get("status"))
            assert (ended["status"], ended["reason"]) == ("lost", "owner_lost")
        assert answer(relay, 1, "/relay/readyz")["status"] == "ready"
        assert pids(relay)[1] != killed
        lost = 'relay_runs_ended_total{reason="owner_lost",status="lost"}'
        await_metrics(relay, 1, **{lost: 1, "relay_runs_open": 0})
        told = metrics(relay, 1)
        assert told[lost] == told['relay_runs_ended_total{reason="producer_end",status="completed"}'] == 1
        assert (told["relay_workers"], told["relay_worker_starts_total"]) == (COUNT, COUNT + 1)
        assert "signal 9" in relay.logged_line("worker 1 is gone")


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_all_workers_drain_when_the_parent_is_told_to_end(
    redis_server: RedisServer,
    upstream: ScriptedUpstream,
    name: str,
    told: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    gate = held(upstream, f"/{name}")
    with started(redis_server, upstream) as relay, contextlib.ExitStack() as open_until_the_end:
        there = [*pids(relay).values(), relay.pid]
        assert len(list(tmp_path.iterdir())) == 1
        answers, readings = [], []
        for worker in (1, 2):
            stream = f"{name}-{worker}"
            page = open_until_the_end.enter_context(Asking(relay, worker, f"/{name}", Relay_Stream=stream))
            page.take(1)
            answers.append(page)
            events = f"/relay/v1/streams/{stream}/events?after=tail"
            readings.append(open_until_the_end.enter_context(Asking(relay, worker, events)))
        relay.process.send_signal(told)
        for reading in readings:
            *_, last = reading.blocks()
            assert last.control is not None
            assert (last.control["type"], last.control["reason"]) == ("bye", "drain")
        gate.open()
        assert [len(page.frames()) for page in answers] == [2, 2]
        assert relay.process.wait(DEADLINE_S) == 0, relay.log
    assert not any(map(is_running, there))
    assert list(tmp_path.iterdir()) == []


def test_workers_drain_when_their_parent_was_killed(
    redis_server: RedisServer,
    upstream: ScriptedUpstream,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started(redis_server, upstream) as relay:
        there = pids(relay).values()
        push(relay, 1, name)
        with contextlib.ExitStack() as open_until_the_end:
            events = f"/relay/v1/streams/{name}/events"
            readings = [open_until_the_end.enter_context(Asking(relay, n, events)) for n in (1, 2)]
            for reading in readings:
                reading.take(1)
            relay.kill()
            for reading in readings:
                *_, last = reading.blocks()
                assert last.control is not None
                assert (last.control["type"], last.control["reason"]) == ("bye", "drain")
    until(lambda: not any(map(is_running, there)))
    assert list(tmp_path.iterdir()) == []


# What keeps them from starting


def test_a_port_that_is_taken_is_said_once(
    pair: RelayProcess, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Also by workers, which let each other listen on it."""
    several = ("--workers", "2", "--journal", redis_server.url())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], pair.port):
            assert f"port {port}" in refusal(*several, "--port", str(port), cwd=tmp_path)
    assert f"port {pair.port}" in refusal("--port", str(pair.port), cwd=tmp_path)


def test_sqlite_is_for_one_process(tmp_path: Path) -> None:
    line = refusal("--workers", "2", cwd=tmp_path)
    assert "--workers 2 needs a Redis journal" in line
    assert list(tmp_path.iterdir()) == []


def test_what_keeps_a_worker_from_starting_is_said_once(tmp_path: Path) -> None:
    line = refusal("--workers", "2", "--journal", "redis://user:secret@127.0.0.1:1/0", cwd=tmp_path)
    assert "cannot be reached" in line
    assert "secret" not in line


# The parent alone, with small programs as its workers


async def supervised(
    monkeypatch: pytest.MonkeyPatch, program: str, then: Callable[[], None], *, closing_s: float = DEADLINE_S
) -> bool:
    """The parent's whole life with workers that are this program; `then` is done when all serve."""
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", program])
    monkeypatch.setattr(workers, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(workers, "CLOSING_S", closing_s)
    settings = Settings(workers=COUNT, drain_grace_s=0, journal_timeout_s=0.01)
    with hold_port() as reserved:
        async with asyncio.timeout(DEADLINE_S):
            return await Supervisor(settings, reserved).run(then)


def end_this() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# What each of these programs begins with.
SAYING = """
import json, os, pathlib, signal, sys, time
place = json.loads(os.environ["_RELAY_WORKER_PLACE"])
def say(**words):
    os.write(place["parent"], json.dumps(words).encode() + b"\\n")
"""


def test_a_worker_that_does_not_end_in_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = SAYING + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(); time.sleep(600)"
    assert asyncio.run(supervised(monkeypatch, program, end_this, closing_s=0.1)) is False


def test_workers_that_end_when_told_have_ended_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they do it: one by itself, one by the signal."""
    program = SAYING + (
        "if place['number'] == 1: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('not for the parent', flush=True); say(); time.sleep(600)"
    )
    assert asyncio.run(supervised(monkeypatch, program, end_this)) is True


def test_a_worker_that_dies_before_it_serves_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("it was said to serve")

    with pytest.raises(StartupError, match="exit code 3"):
        asyncio.run(supervised(monkeypatch, "import sys; sys.exit(3)", never))


def test_a_directory_that_cannot_be_made_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: str) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StartupError, match="No space left"):
        asyncio.run(supervised(monkeypatch, "", end_this))


def test_a_worker_that_cannot_be_replaced_at_once_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each worker serves and dies, finds no journal twice, then the parent is told to end."""
    program = f"""{SAYING}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
here = pathlib.Path({str(tmp_path)!r})
starts = here / str(place["number"])
with starts.open("a") as file:
    file.write("x")
life = len(starts.read_text())
say(**({{}} if life in (1, 4) else {{"failed": "no journal"}}))
if life == 1:
    while not (here / "all-serve").exists():
        time.sleep(0.01)
if life < 4:
    sys.exit(1)
if place["number"] == 1:
    while len((here / "2").read_text()) < 4:
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    announced = []

    def all_serve() -> None:
        announced.append(True)
        (tmp_path / "all-serve").touch()

    assert asyncio.run(supervised(monkeypatch, program, all_serve)) is True
    assert announced == [True]
    messages = [record.message for record in caplog.records]
    assert sum("no journal" in message for message in messages) == 2 * COUNT
    assert any("worker 2 is gone" in message and "exit code 1" in message for message in messages)
