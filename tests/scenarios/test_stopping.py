"""A Stop that dropped what was shown, and writers that came back after it."""

from __future__ import annotations

import threading

import pytest
from producing import Producer, ask
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scenarios.acting import DONE, cancel, chunk_of, events_of, kinds, rest_of, seqs, transcript, until
from scenarios.conftest import Receiver
from scripted_upstream import Exchange, ScriptedUpstream


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_a_cancel_whose_partial_answer_was_dropped_because_an_earlier_reply_was_contained_in_it(
    leased: RelayProcess, upstream: ScriptedUpstream, receiver: Receiver, name: str, route: str
) -> None:
    """Frames are told apart by run and seq, so text that begins like an older one is kept like any other."""
    relay = leased
    older = Producer(relay, name, dialect="openai-chat")
    older.push(chunk_of("Sure").decode()[6:].strip(), "[DONE]", end="completed")
    pieces = [chunk_of("Sure"), chunk_of(", I can"), chunk_of(" do")]
    if route == "proxied":

        async def handler(exchange: Exchange) -> None:
            await exchange.head()
            for piece in pieces:
                await exchange.chunk(piece)
            await exchange.closed()

        upstream.on(f"/{name}/chat/completions", handler)
        with Reading(f"{relay.url}/{name}/chat/completions", Relay_Stream=name) as page:
            page.take(3)
    else:
        producer = Producer(relay, name, dialect="openai-chat")
        producer.push(*(piece.decode()[6:].strip() for piece in pieces))
    with events_of(relay, name) as tab:
        seen = until(tab, "run.ended") + until(tab, "live")
        run = cancel(relay, name)["run"]
        seen += until(tab, "run.ended", run=run)
    (ended,) = [
        block.control for block in seen if block.control and block.control.get("reason") == "client_cancel"
    ]
    assert (ended["run"], ended["status"], ended["frames"]) == (run, "cancelled", 3)
    assert ended["text_bytes"] == len("Sure, I can do")
    assert seqs(seen) == list(range(1, len(seqs(seen)) + 1))
    assert transcript(relay, name, older.run)["text"] == "Sure"
    kept = transcript(relay, name, run)
    assert (kept["text"], kept["status"], kept["truncated"]) == ("Sure, I can do", "cancelled", False)
    assert receiver.handed_over(run) == kept
    assert cancel(relay, name, run)["reason"] == "client_cancel"
    assert cancel(relay, name)["run"] is None


def test_a_stale_writer_that_came_back_after_its_turn_was_cancelled_is_fenced(
    relay: RelayProcess, name: str
) -> None:
    """Whatever it tries, the terminal frame stays the last of its run."""
    stale = Producer(relay, name)
    stale.push("one", Relay_Seq="1")
    cancel(relay, name, stale.run)
    newer = Producer(relay, name)
    newer.push("newer")
    for answer in (
        stale.push("two", Relay_Seq="2"),
        stale.push("unnumbered"),
        stale.push(end="completed"),
        stale.ask("end", {"status": "completed"}),
        stale.ask("writer"),
    ):
        assert answer.problem == (409, "run_ended")
        assert (answer.json["run_status"], answer.json["reason"]) == ("cancelled", "client_cancel")
    assert stale.push("one", Relay_Seq="1").json["duplicates"] == 1
    assert stale.ask("heartbeat").json["status"] == "cancelled"
    with stale.body() as body:
        body.lines("three")
        assert body.finish().problem["code"] == "run_ended"
    newer.push("end", end="completed")
    with events_of(relay, name) as tab:
        seen = until(tab, "run.ended", run=newer.run)
    assert kinds(seen) == [
        f"run.started:{stale.run}", "one", f"run.ended:{stale.run}",
        f"run.started:{newer.run}", "newer", "end", f"run.ended:{newer.run}",
    ]  # fmt: skip


def test_a_stale_writer_that_came_back_after_its_run_was_taken_over_is_fenced(
    relay: RelayProcess, name: str
) -> None:
    stale = Producer(relay, name)
    stale.push("one", Relay_Seq="1")
    with stale.body() as body:
        body.lines("two")
        with events_of(relay, name) as tab:
            while "two" not in kinds(tab.take(1)):
                pass
        taken = ask(relay.port, "POST", f"{name}/runs/{stale.run}/writer").json
        assert taken["next_seq"] == 3
        body.lines("late")
        assert body.finish().problem["code"] == "fenced"
    for answer in (stale.push("late"), stale.push(end="completed"), stale.ask("heartbeat")):
        assert answer.problem == (409, "fenced")
    stale.writer, old = taken["writer"], stale.writer
    stale.push("three", end="completed", Relay_Seq="3")
    assert stale.push("late", Relay_Writer=old).problem == (409, "fenced")
    record = whole_run(relay, name)
    assert record.texts == ["one", "two", "three"]
    assert record.outcome == ("completed", "producer_end")


@pytest.mark.parametrize("stops", ["cancel", "takeover"])
@pytest.mark.parametrize("goes_on", ["speaking", "thinking"])
def test_an_agent_that_goes_on_after_its_turn_was_stopped_elsewhere_is_hung_up_on(
    instances: tuple[RelayProcess, RelayProcess],
    upstream: ScriptedUpstream,
    name: str,
    stops: str,
    goes_on: str,
) -> None:
    """The owner is told by the other relay, closes upstream, and journals nothing more."""
    owner, other = instances
    hung_up, stopped = threading.Event(), upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(chunk_of("one"))
        await stopped.wait()
        try:
            while goes_on == "speaking":
                await exchange.chunk(chunk_of("late"))
            await exchange.closed()
        finally:
            hung_up.set()

    upstream.on(f"/{name}", handler)
    with Reading(f"{owner.url}/{name}", Relay_Stream=name) as page:
        page.take(1)
        run = page.headers["relay-run"]
        if stops == "cancel":
            cancel(other, name)
        else:
            writer = ask(other.port, "POST", f"{name}/runs/{run}/writer").json["writer"]
        stopped.open()
        assert hung_up.wait(60)
        if stops == "takeover":
            ask(
                other.port, "POST", f"{name}/runs/{run}/frames?end=completed",
                [{"data": chunk_of("two").decode()[6:].strip()}, {"data": DONE.decode()[6:].strip()}],
                Relay_Writer=writer,
            )  # fmt: skip
        shown = [block.data for block in rest_of(page)]
    record = whole_run(other, name)
    if stops == "cancel":
        assert record.outcome == ("cancelled", "client_cancel")
        assert transcript(owner, name, run)["text"] == "one"
        assert len(record.frames) == 2  # what was said, and that it was stopped, in the answer's own format
        assert '"code":"client_cancel"' in record.texts[1]
        assert shown == record.texts[1:]
    else:
        assert record.outcome == ("completed", "producer_end")
        assert transcript(owner, name, run)["text"] == "onetwo"
        assert shown == record.texts[1:]
