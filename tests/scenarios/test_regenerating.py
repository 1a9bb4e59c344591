"""A regenerate that tabs saw only after a refresh, that Stop could not stop, and that reached too far."""

from __future__ import annotations

import threading
import time

import pytest
from producing import Producer, ask
from reading import Block, Reading
from relay_process import RelayProcess
from run_record import whole_run
from scenarios.acting import agent, cancel, events_of, kinds, rest_of, transcript, until
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

DEADLINE_S = 60


def rendered(blocks: list[Block]) -> str:
    """What a tab shows in the end: the text of the runs that were not replaced."""
    texts: dict[str, str] = {}
    current = ""
    for block in blocks:
        control = block.control
        if control is None:
            texts[current] += block.data
        elif control["type"] == "run.started":
            current = control["run"]
            texts.setdefault(current, "")
        elif control["type"] == "run.superseded":
            texts.pop(control["run"], None)
    return "|".join(texts.values())


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_a_regenerate_that_tabs_saw_only_after_a_refresh_is_seen_live_in_every_tab(
    instances: tuple[RelayProcess, RelayProcess], upstream: ScriptedUpstream, name: str, route: str
) -> None:
    """Three tabs at two relays: one up to date, one in the midst of its replay behind a stalled network, one
    that knows only its chat. All come to show the new answer."""
    one, other = instances
    older = Producer(one, name)
    piece = "x" * 60_000
    for _ in range(150):
        older.push(piece)
    older.push("old answer")
    flowing = threading.Event()

    def hold_back(data: bytes) -> bytes:
        flowing.wait(60)
        return data

    with (
        TcpProxy.running(other.port, to_client=hold_back) as stalled,
        events_of(one, name) as live,
        events_of(other, name, "run=current") as reloaded,
    ):
        behind: list[Block] = []

        def read_behind() -> None:
            with events_of(stalled.url, name) as tab:
                behind.extend(until(tab, "run.ended", run=newer))

        seen_live = until(live, "live")
        seen_reloaded = until(reloaded, "live")
        newer = "newer" if route == "pushed" else ""
        replaying = threading.Thread(target=read_behind, daemon=True)
        replaying.start()
        lag, deadline = 0, time.monotonic() + DEADLINE_S
        while not lag:
            assert time.monotonic() < deadline, "nobody is behind"
            readers = other.json("/relay/v1/diagnostics")["readers"]
            lag = max((reader["lag"] for reader in readers if reader["stream"] == name), default=0)
        if route == "pushed":
            opened = ask(one.port, "POST", f"{name}/runs", {"run": newer, "supersedes": "latest"}).json
            assert (opened["superseded"], opened["frames_after"]) == ([older.run], 0)
            writer = opened["writer"]
        else:
            gate = agent(upstream, f"/{name}", [b"data: new\n\n"], [b"data:  answer\n\n"])
            page = Reading(f"{one.url}/{name}", Relay_Stream=name, Relay_Supersedes="latest")
            newer = page.headers["relay-run"]
            assert page.headers["relay-frames-after"] == "0"
        seen_live += until(live, "run.started", run=newer)
        seen_reloaded += rest_of(reloaded)
        with events_of(other, name, "run=current") as current:
            if route == "pushed":
                frames = [{"data": "new"}, {"data": " answer"}]
                path = f"{name}/runs/{newer}/frames?end=completed"
                assert ask(other.port, "POST", path, frames, Relay_Writer=writer).status == 200
            else:
                gate.open()
                rest_of(page)
                page.cut()
            seen_current = until(current, "run.ended")
        seen_live += until(live, "run.ended", run=newer)
        flowing.set()
        replaying.join(60)
        assert not replaying.is_alive()
    assert older.push("late").problem == (409, "run_ended")
    turn = [
        f"run.superseded:{older.run}", f"run.ended:{older.run}",
        f"run.started:{newer}", "new", " answer", f"run.ended:{newer}",
    ]  # fmt: skip
    assert kinds(seen_live)[-7:] == kinds(behind)[-7:] == ["old answer", *turn]
    assert kinds(seen_reloaded)[-3:] == ["old answer", *turn[:2]]
    assert kinds(seen_current) == turn[2:]
    assert rendered(seen_live) == rendered(behind) == rendered(seen_current) == "new answer"
    superseded = next(block.control for block in seen_reloaded if '"run.superseded"' in block.data)
    assert superseded == {"type": "run.superseded", "run": older.run, "by": newer}
    ended = seen_reloaded[-2].control or {}
    assert (ended["status"], ended["reason"]) == ("cancelled", "superseded")


@pytest.mark.parametrize("at", ["at once", "after a frame"])
def test_p7_a_regenerate_that_stop_could_not_stop_is_stopped_from_another_relay(
    instances: tuple[RelayProcess, RelayProcess], name: str, at: str
) -> None:
    """Stop means the new run, though the page that asks may know of the old one only."""
    one, other = instances
    older = Producer(one, name)
    older.push("old")
    newer = Producer(one, name, supersedes=older.run)
    if at == "after a frame":
        newer.push("new")
    stopped = cancel(other, name)
    assert (stopped["run"], stopped["status"], stopped["reason"]) == (newer.run, "cancelled", "client_cancel")
    assert cancel(other, name, older.run)["reason"] == "superseded"
    assert newer.push("late").problem == (409, "run_ended")
    assert whole_run(one, name, newer.run).texts == (["new"] if at == "after a frame" else [])
    assert one.json(f"/relay/v1/streams/{name}")["open_runs"] == []


@pytest.mark.parametrize("route", ["proxied", "pushed", "called"])
def test_a_regenerate_that_reached_into_another_chat_is_refused_and_changes_nothing_anywhere(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, route: str
) -> None:
    ours, theirs = Producer(relay, f"{name}-a"), Producer(relay, f"{name}-b")
    ours.push("ours")
    theirs.push("theirs")

    def state() -> list[object]:
        return [relay.json(f"/relay/v1/streams/{name}-{each}") for each in "ab"]

    before = state()
    both = [ours.run, theirs.run]
    if route == "pushed":
        answer = ask(relay.port, "POST", f"{name}-a/runs", {"supersedes": both})
        assert answer.problem == (404, "unknown_run")
    elif route == "called":
        body = {"supersedes": both, "upstream": {"path": f"/{name}"}}
        answer = ask(relay.port, "POST", f"{name}-a/runs", body)
        assert answer.problem == (404, "unknown_run")
        assert upstream.calls(f"/{name}") == 0
    else:
        agent(upstream, f"/{name}", [b"data: new\n\n"]).open()
        with Reading(
            f"{relay.url}/{name}", Relay_Stream=f"{name}-a", Relay_Supersedes=",".join(both)
        ) as refused:
            assert refused.status == 404
            refused.read()
    assert state() == before
    for producer in (ours, theirs):
        assert producer.push("more", end="completed").status == 200
        assert whole_run(relay, producer.stream).outcome == ("completed", "producer_end")


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_a_regenerate_that_redid_one_half_of_a_turn_and_whose_log_claimed_what_it_did_not_do(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, route: str
) -> None:
    """Two runs of one turn are superseded at once; what others said at or after its start stays, is counted,
    and the log says so and names whose it is."""
    before = Producer(relay, name)
    before.push("question")
    first, second = Producer(relay, name), Producer(relay, name)
    first.push("half")
    bystander = Producer(relay, name)
    second.push("other half")
    bystander.push("a note", "another")
    second.push("ends by itself", end="completed")
    logged = len(relay.log)
    wanted = [first.run, second.run]
    if route == "pushed":
        opened = ask(relay.port, "POST", f"{name}/runs", {"supersedes": wanted}).json
        newer, frames_after = opened["run"], opened["frames_after"]
        assert sorted(opened["superseded"]) == sorted(wanted)
    else:
        agent(upstream, f"/{name}", [b"data: new\n\n"]).open()
        with Reading(f"{relay.url}/{name}", Relay_Stream=name, Relay_Supersedes=",".join(wanted)) as page:
            newer, frames_after = page.headers["relay-run"], int(page.headers["relay-frames-after"])
            page.read()
    # What the bystander was: its start and two notes. Nothing of it, or of the question, is touched.
    assert frames_after == 3
    runs = {run["run"]: run for run in relay.json(f"/relay/v1/streams/{name}/runs")["runs"]}
    assert [runs[run]["superseded_by"] for run in wanted] == [newer, newer]
    assert (runs[first.run]["status"], runs[first.run]["reason"]) == ("cancelled", "superseded")
    assert (runs[second.run]["status"], runs[second.run]["reason"]) == ("completed", "producer_end")
    for kept in (before, bystander):
        assert (runs[kept.run]["status"], runs[kept.run]["superseded_by"]) == ("open", None)
        kept.push(end="completed")
    warning = relay.logged_line(f"stream={name} run={newer} supersedes", since=logged)
    assert "WARNING" in warning
    assert "3 frames of other runs" in warning
    assert "at or after the start of the first superseded run" in warning
    assert "not rolled back" in warning
    assert all(run in warning for run in (*wanted, newer, bystander.run))
    assert before.run not in warning
    assert transcript(relay, name, first.run)["text"] == "half"
    with events_of(relay, name) as tab:
        seen = [block for _ in range(5 if route == "proxied" else 4) for block in until(tab, "run.ended")]
    said = kinds(seen)
    assert said.index(f"run.superseded:{first.run}") + 1 == said.index(f"run.ended:{first.run}")
    assert said.index(f"run.started:{newer}") < said.index(f"run.superseded:{second.run}")
