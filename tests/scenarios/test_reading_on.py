"""Answers that were rendered twice, lost at a reload, or dropped as old."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest
from producing import Producer, ask
from reading import Block, Reading
from relay_process import RelayProcess
from run_record import whole_run
from scenarios.acting import agent, events_of, kinds, rest_of, seqs, until
from scripted_upstream import ScriptedUpstream


def cut_after(url: str, path: str, size: int, **headers: str) -> bytes | None:
    """The first bytes of an answer whose connection is cut then; None when it is not so long yet."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET", path, headers={key.replace("_", "-"): v for key, v in headers.items()})
        return connection.getresponse().read(size)
    finally:
        connection.close()


def dispatched(data: bytes) -> Iterator[Block]:
    """The events that a browser has dispatched of these bytes."""
    id_ = ""
    for block in data.decode(errors="ignore").split("\n\n")[:-1]:
        fields = dict(line.partition(": ")[::2] for line in block.split("\n"))
        id_ = fields.get("id", id_)
        if "data" in fields:
            yield Block(id_, fields.get("event", ""), fields["data"])


def length_of(reading: Reading, count: int) -> int:
    """How many bytes the first events take."""
    size = 0
    for line in reading.lines():
        size += len(line.encode()) + 1
        if line.startswith("data") and "relay" not in line and "type" not in line:
            count -= 1
        if not line and not count:
            return size
    raise AssertionError("the answer ended")


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_text_rendered_twice_after_a_cut_at_any_byte_of_a_live_answer(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, route: str
) -> None:
    """Every frame carries an id from the first one on, so each is rendered once, wherever the cut was."""
    words = ["one", "two", "three"]
    if route == "proxied":
        gate = agent(upstream, f"/{name}", [f"data: {word}\n\n".encode() for word in words])
        path, key = f"/{name}", {"Idempotency_Key": name}
        first = Reading(relay.url + path, **key)
        first.take(3)
    else:
        producer = Producer(relay, name)
        producer.push(*words)
        path, key = f"/relay/v1/streams/{name}/events?run={producer.run}", {}
    with Reading(relay.url + path, **key) as whole:
        size = length_of(whole, len(words))
    cuts = 0
    for cut in range(1, size + 1):
        data = cut_after(relay.url, path, cut, **key)
        assert data is not None
        assert len(data) == cut
        seen = list(dispatched(data))
        rendered = [block for block in seen if block.event != "relay"]
        assert all(block.id for block in seen)
        resume = {"Last_Event_ID": seen[-1].id} if seen else {}
        with Reading(relay.url + path, **(key | resume)) as again:
            while len(rendered) < len(words):
                rendered += [block for block in again.take(1) if block.event != "relay"]
        assert [block.data for block in rendered] == words
        assert len({block.id for block in rendered}) == len(words)
        cuts += 1
    assert cuts == size > 100
    if route == "proxied":
        first.cut()
        gate.open()
        assert upstream.calls(f"/{name}") == 1
    else:
        producer.push(end="completed")
    assert whole_run(relay, name if route == "pushed" else first.headers["relay-stream"]).texts == words


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_a_page_reloaded_mid_answer_that_knows_only_its_chats_id(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, route: str
) -> None:
    """`run=current` is this answer from its start and on live; 204 when there is none."""
    older = Producer(relay, name)
    older.push("older", end="completed")
    with events_of(relay, name, "run=current") as none:
        assert none.status == 204
    if route == "proxied":
        gate = agent(upstream, f"/{name}", [b"data: one\n\n"], [b"data: two\n\n"])
        with Reading(f"{relay.url}/{name}", Relay_Stream=name) as page:
            page.take(1)
    else:
        producer = Producer(relay, name)
        producer.push("one")
    with events_of(relay, name, "run=current") as reloaded:
        seen = until(reloaded, "live")
        if route == "proxied":
            gate.open()
        else:
            producer.push("two", end="completed")
        seen += rest_of(reloaded)
    assert [block.data for block in seen if block.control is None] == ["one", "two"]
    assert kinds(seen)[0].startswith("run.started:")
    assert kinds(seen)[-1].startswith("run.ended:")
    with events_of(relay, name, "run=current") as none:
        assert none.status == 204


def test_a_view_that_unmounts_and_comes_back_many_times_fast_loses_nothing(
    relay: RelayProcess, name: str
) -> None:
    producer = Producer(relay, name)
    words = [f"w{n}" for n in range(60)]
    seen: list[Block] = []
    last_id = ""
    for number, word in enumerate(words):
        producer.push(word)
        # Some visits are over before they began: nothing of them is read.
        headers = {"Last_Event_ID": last_id} if last_id else {}
        with events_of(relay, name, **headers) as visit:
            for _ in range((0, 1, 3, 2)[number % 4]):
                (block,) = visit.take(1)
                seen.append(block)
                last_id = block.id
    producer.push(end="completed")
    with events_of(relay, name, f"run={producer.run}", Last_Event_ID=last_id) as visit:
        seen += rest_of(visit)
    assert [block.data for block in seen if block.control is None] == words
    assert seqs(seen) == list(range(1, len(words) + 3))
    ended = relay.json("/relay/v1/diagnostics")["ended_readers"]
    reasons = [reader["reason"] for reader in ended if reader["stream"] == name]
    assert set(reasons) <= {"client_closed", "ended"}
    assert len(reasons) > 30


def test_a_conversation_reused_for_many_turns_whose_counter_restarted_so_that_new_text_was_dropped(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Seqs go on over all turns, whoever speaks, and a reader of the whole takes every turn for new."""
    upstream.on_stream(f"/{name}", [b"data: proxied\n\n"])
    ask(relay.port, "PUT", name)
    with events_of(relay, name) as reading:
        last_id = ""
        for turn in range(12):
            if turn % 2:
                with Reading(f"{relay.url}/{name}", Relay_Stream=name) as answer:
                    answer.read()
            else:
                Producer(relay, name).push(f"pushed {turn}", end="completed")
            if not last_id:
                last_id = until(reading, "run.ended")[-1].id
        with events_of(relay, name, Last_Event_ID=last_id) as later:
            rest = [block for _ in range(11) for block in until(later, "run.ended")]
    assert seqs(rest) == list(range(4, 37))
    with events_of(relay, name) as reading:
        whole = [block for _ in range(12) for block in until(reading, "run.ended")]
    assert seqs(whole) == list(range(1, 37))
    assert len({block.id for block in whole if seqs([block])}) == 36


def test_a_recreated_stream_whose_new_text_was_dropped_as_old_is_told_apart_by_its_ids(
    relay: RelayProcess, name: str
) -> None:
    first = Producer(relay, name, run="r")
    first.push("old one", "old two", end="completed")
    with events_of(relay, name) as reading:
        old = until(reading, "run.ended")
        assert ask(relay.port, "DELETE", name).status == 204
        until(reading, "bye", reason="deleted")
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404
    second = Producer(relay, name, run="r")
    second.push("new one", "new two", end="completed")
    for block in (old[-1], next(each for each in old if each.data == "old one")):
        with events_of(relay, name, Last_Event_ID=block.id) as back:
            seen = until(back, "run.ended")
        controls = [each.control for each in seen if each.control is not None]
        assert [each["reason"] for each in controls if each["type"] == "reset"] == ["recreated"]
        assert kinds(seen) == ["run.started:r", "new one", "new two", "run.ended:r"]
        assert {each.id for each in seen if seqs([each])}.isdisjoint({each.id for each in old})
    with events_of(relay, name, "control=none", Last_Event_ID=old[-1].id) as told:
        assert told.status == 410
    assert first.push("late").problem in ((409, "fenced"), (409, "run_ended"))
