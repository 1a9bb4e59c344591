"""relay.diagnostics: what a process says it holds open, and how what it held ended."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from producing import DEADLINE_S, Producer, ask
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, Gate, ScriptedUpstream

from relay.diagnostics import LISTED, RECENT, Colleagues, Diagnostics, merged
from relay.errors import StartupError
from relay.lifecycle import Reason, ending

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def of(relay: RelayProcess, kind: str, stream: str) -> list[dict[str, Any]]:
    """What the process says of a stream."""
    return [entry for entry in relay.json("/relay/v1/diagnostics")[kind] if entry["stream"] == stream]


def held(upstream: ScriptedUpstream, path: str, *said: str) -> Gate:
    """An agent that falls silent until it may end."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for word in said:
            await exchange.chunk(f"data: {word}\n\n".encode())
        await gate.wait()
        await exchange.end()

    upstream.on(path, handler)
    return gate


def test_an_open_run_is_shown_with_its_age_and_silence_and_then_with_its_ending(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held(upstream, f"/{name}", "one")
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as page:
        page.take(1)
        run = page.headers["relay-run"]
        (shown,) = of(relay, "open_runs", name)
        assert (shown["run"], shown["dialect"]) == (run, "raw")
        assert 0 <= shown["silent_s"] <= shown["age_s"]
        (later,) = of(relay, "open_runs", name)
        assert later["silent_s"] >= shown["silent_s"]
        assert of(relay, "ended_runs", name) == []
        gate.open()
        page.read()
    whole_run(relay, name)
    assert of(relay, "open_runs", name) == []
    (ended,) = of(relay, "ended_runs", name)
    assert TIME.fullmatch(ended.pop("at"))
    assert ended == {
        "stream": name, "run": run, "status": "completed", "reason": "upstream_end", "error": None,
    }  # fmt: skip


def test_the_most_silent_run_comes_first(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    gates = [held(upstream, f"/{name}-{n}", "one") for n in range(3)]
    pages = [Reading(f"{relay.url}/{name}-{n}", Relay_Stream=f"{name}-{n}") for n in range(3)]
    for page in pages:
        page.take(1)
    shown = relay.json("/relay/v1/diagnostics")["open_runs"]
    assert [run["stream"] for run in shown if run["stream"].startswith(name)] == [
        f"{name}-{n}" for n in range(3)
    ]
    silences = [run["silent_s"] for run in shown]
    assert silences == sorted(silences, reverse=True)
    for gate, page in zip(gates, pages, strict=True):
        gate.open()
        page.read()
        page.cut()


def test_a_pushed_run_is_shown_when_it_ended_however_it_did(relay: RelayProcess, name: str) -> None:
    first, second, third, fourth = (Producer(relay, name) for _ in range(4))
    first.ask("end", {"status": "failed", "error": "no more paper"})
    ask(relay.port, "POST", f"{name}/runs/{second.run}/cancel", {"reason": "the user's wish"})
    Producer(relay, name, supersedes=third.run).push(end="completed")
    ask(relay.port, "DELETE", name)
    ended = [(entry["run"], entry["reason"], entry["error"]) for entry in of(relay, "ended_runs", name)]
    assert ended[:3] == [
        (first.run, "producer_failed", "no more paper"),
        (second.run, "client_cancel", "the user's wish"),
        (third.run, "superseded", None),
    ]
    assert ended[3][1] == "producer_end"
    assert ended[4] == (fourth.run, "stream_deleted", None)


def test_a_repeated_cancel_is_one_ending(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    for _ in range(3):
        ask(relay.port, "POST", f"{name}/runs/{producer.run}/cancel")
    producer.push("late", end="completed")
    assert [entry["reason"] for entry in of(relay, "ended_runs", name)] == ["client_cancel"]


def test_a_reader_is_shown_with_its_lag_while_it_is_open_and_with_its_reason_then(
    relay: RelayProcess, name: str
) -> None:
    producer = Producer(relay, name)
    for _ in range(150):
        producer.push("x" * 60_000)
    events = f"{relay.url}/relay/v1/streams/{name}/events"
    with (
        Reading(events, Accept_Encoding="identity") as stuck,  # compressed, it would all fit into the kernel
        Reading(f"{events}?after=tail") as current,
    ):
        stuck.take(1)
        current.take(2)
        behind, up_to_date = of(relay, "readers", name)
        assert behind["lag"] > 0
        assert (up_to_date["lag"], up_to_date["blocked_s"]) == (0, 0)
        assert int(up_to_date["cursor"].partition("-")[0]) == 151
        assert int(behind["cursor"].partition("-")[0]) == 151 - behind["lag"]
        relay.until(lambda: bool(of(relay, "readers", name)[0]["blocked_s"]), "the connection takes no more")
    relay.until(lambda: len(of(relay, "ended_readers", name)) == 2, "both are known to have left")
    assert {entry["reason"] for entry in of(relay, "ended_readers", name)} == {"client_closed"}
    assert of(relay, "readers", name) == []
    producer.push(end="completed")
    with Reading(f"{events}?run={producer.run}&after=tail&control=none") as whole:
        assert whole.status == 204
    with Reading(f"{events}?run={producer.run}") as whole:
        last = list(whole.blocks())[-1]
    relay.until(lambda: len(of(relay, "ended_readers", name)) == 3, "it has ended")
    entry = of(relay, "ended_readers", name)[-1]
    assert TIME.fullmatch(entry.pop("at"))
    assert entry == {"stream": name, "run": producer.run, "reason": "ended", "cursor": last.id}


@pytest.mark.parametrize("more", [0, 1, RECENT])
def test_the_most_recent_endings_are_kept_and_no_more(more: int) -> None:
    diagnostics = Diagnostics()
    for number in range(RECENT + more):
        diagnostics.run_ended("s", f"r{number}", ending(Reason.OWNER_LOST), number)
    report = diagnostics.report((), (), 0.0)
    assert [entry["run"] for entry in report["ended_runs"]] == [f"r{more + n}" for n in range(RECENT)]
    assert report["ended_runs"][0]["at"].startswith("1970-01-01T00:00:00.")


def test_a_process_that_is_new_has_nothing_to_tell() -> None:
    assert Diagnostics().report((), (), 0.0) == {
        "open_runs": [], "readers": [], "ended_runs": [], "ended_readers": [],
    }  # fmt: skip


def of_worker(number: int, **held: Any) -> dict[str, Any]:
    """What a worker says of itself."""
    lists = {kind: [] for kind in ("open_runs", "readers", "ended_runs", "ended_readers")}
    return {"worker": number, "pid": 100 + number, "draining": False} | lists | held


def test_the_lists_of_several_workers_keep_their_order_and_their_bounds() -> None:
    reports = [
        of_worker(
            worker,
            draining=worker == 2,
            open_runs=[{"run": f"{worker}-{n}", "silent_s": 2 * n + worker} for n in reversed(range(LISTED))],
            readers=[{"lag": 2 * n + worker} for n in reversed(range(LISTED))],
            ended_runs=[{"at": f"{2 * n + worker:03}"} for n in range(RECENT)],
            ended_readers=[{"at": f"{2 * n + worker:03}"} for n in range(RECENT)],
        )
        for worker in (1, 2)
    ]
    told = merged(reports)
    assert told["draining"] is True
    assert [run["silent_s"] for run in told["open_runs"]] == list(range(2 * LISTED, LISTED, -1))
    assert told["open_runs"][0] == {"worker": 2, "run": f"2-{LISTED - 1}", "silent_s": 2 * LISTED}
    assert [reader["lag"] for reader in told["readers"]] == list(range(2 * LISTED, LISTED, -1))
    for kind in ("ended_runs", "ended_readers"):
        assert [int(entry["at"]) for entry in told[kind]] == list(range(RECENT + 1, 2 * RECENT + 1))


def test_a_worker_that_does_not_answer_is_shown_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second holds a run; the third is not there; the fourth stands still."""
    held = {"run": "r", "silent_s": 1}
    ask = Colleagues._ask

    async def ask_patiently(self: Colleagues, number: int) -> dict[str, Any]:
        # Whoever answers has all the time there is, however slow the machine.
        monkeypatch.setattr("relay.diagnostics.ANSWER_S", 0.1 if number == 4 else DEADLINE_S)
        return await ask(self, number)

    monkeypatch.setattr(Colleagues, "_ask", ask_patiently)

    async def asked() -> dict[str, Any]:
        directory = str(tmp_path)
        first = Colleagues(1, 4, directory, lambda: of_worker(1))
        second = Colleagues(2, 4, directory, lambda: of_worker(2, open_runs=[held]))
        await first.start()
        await second.start()
        still = socket.socket(socket.AF_UNIX)
        still.bind(str(tmp_path / "worker-4.sock"))
        still.listen()
        try:
            return await first.report()
        finally:
            still.close()
            second.close()
            first.close()

    told = asyncio.run(asked())
    assert told["open_runs"] == [{"worker": 2} | held]
    assert [(entry["worker"], entry["answers"]) for entry in told["workers"]] == [
        (1, True), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    assert told["workers"][3] == {"worker": 4, "pid": None, "answers": False}


def test_workers_that_could_not_talk_to_each_other_do_not_start(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    with pytest.raises(StartupError, match="TMPDIR"):
        asyncio.run(Colleagues(1, 2, str(deep), dict).start())
    assert not os.listdir(deep)
