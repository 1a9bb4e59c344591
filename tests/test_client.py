"""relay.client: what a Python program reads and pushes, through cuts, restarts, takeovers and losses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import producing
import pytest
from producing import ask
from redis_server import RedisServer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from relay import client
from relay.client import Frame, Producer, Refused, Unreachable, cancel, subscribe, transcript
from relay.errors import (
    CursorGone,
    Fenced,
    FrameTooLarge,
    InvalidEvent,
    InvalidParameter,
    MalformedCursor,
    RelayError,
    RunEnded,
    StreamBusy,
    UnknownRun,
    UnknownStream,
)

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_S", 0.05)
    monkeypatch.setattr(client, "RETRY_MAX_S", 0.05)


def go(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, in time."""
    return asyncio.run(asyncio.wait_for(work, DEADLINE_S))


async def read(url: str, stream: str, count: int | None = None, **wishes: Any) -> list[Frame]:
    """The frames to the end, or so many of them."""
    frames: list[Frame] = []
    async with contextlib.aclosing(subscribe(url, stream, **wishes)) as reading:
        async for frame in reading:
            frames.append(frame)
            if len(frames) == count:
                break
    return frames


def texts(frames: list[Frame]) -> list[str]:
    return [frame.data for frame in frames if frame.event != "relay"]


def kinds(frames: list[Frame]) -> list[str]:
    return [frame.control["type"] for frame in frames if frame.control is not None]


def words(count: int) -> list[str]:
    """Which do not compress."""
    noise = random.Random(1)
    return [noise.randbytes(40).hex() for _ in range(count)]


def pushed(relay: RelayProcess, stream: str, *data: str, **wishes: Any) -> producing.Producer:
    """A whole run."""
    producer = producing.Producer(relay, stream, **wishes)
    producer.push(*data, end="completed")
    return producer


Answer = list[dict[str, Any]] | tuple[Any, ...]
"""Lines, or a status, a body and headers."""


def fake(upstream: ScriptedUpstream, stream: str, *answers: Answer) -> str:
    """Something that passes for relay, and gives these answers for a stream, the last one ever again."""
    left = list(answers)

    async def handler(exchange: Exchange) -> None:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, tuple):
            await exchange.answer(answer[0], answer[1], "application/problem+json", *answer[2:])
            return
        await exchange.head("200 OK", "application/x-ndjson")
        await exchange.chunk(b"".join(json.dumps(line).encode() + b"\n" for line in answer))
        await exchange.end()

    upstream.on(f"/relay/v1/streams/{stream}/events", handler)
    return upstream.url


def line(seq: int, data: str) -> dict[str, Any]:
    return {"id": f"{seq}-1", "event": "", "data": data, "run": "r", "at": "2026-01-01T00:00:00.000Z"}


def notice(kind: str, id_: str | None = None, **members: Any) -> dict[str, Any]:
    said = json.dumps({"type": kind} | members)
    return {"id": id_, "event": "relay", "data": said, "run": None, "at": None}


ENDED = notice("bye", reason="ended", retry_ms=1)


# --- reading ------------------------------------------------------------------------------------------


def test_a_stream_is_read_to_its_end(relay: RelayProcess, name: str) -> None:
    run = pushed(relay, name, "one", "t\r\nwo", seal=True).run
    frames = go(read(relay.url + "/", name))
    assert texts(frames) == ["one", "t\r\nwo"]
    assert [(frame.event, frame.run) for frame in frames] == [("", run), ("", run)]
    assert all(re.fullmatch(r"[0-9]+-[0-9]+", frame.id) for frame in frames)
    assert frames[0].at.endswith("Z")
    assert go(read(relay.url, name, after=frames[-1].id)) == []
    shown = go(read(relay.url, name, control="events"))
    assert texts(shown) == ["one", "t\r\nwo"]
    assert kinds(shown)[:2] == ["hello", "run.started"]
    assert kinds(shown)[-2:] == ["run.ended", "bye"]


def test_one_run_is_read_to_its_end_by_name_or_as_the_latest(relay: RelayProcess, name: str) -> None:
    first = pushed(relay, name, "one")
    pushed(relay, name, "two")
    assert texts(go(read(relay.url, name, run=first.run))) == ["one"]
    assert texts(go(read(relay.url, name, run="latest"))) == ["two"]
    assert go(read(relay.url, name, run="current")) == []


@pytest.mark.parametrize("run", [None, "latest"])
def test_p2_each_frame_is_read_once_over_cuts_at_random_bytes(
    relay: RelayProcess, name: str, run: str | None
) -> None:
    said = words(150)
    pushed(relay, name, *said, seal=True)
    cuts = random.Random(7)
    with TcpProxy.running(relay.port, lambda number: cuts.randrange(1, 4000)) as cutting:
        frames = go(read(cutting.url, name, run=run, control="events"))
        assert cutting.connections > 5
    assert texts(frames) == said
    journaled = [frame.id for frame in frames if frame.run]
    assert len(set(journaled)) == len(journaled) == len(said) + 2


def test_p2_a_cursor_that_was_stored_goes_on_in_another_process(relay: RelayProcess, name: str) -> None:
    said = words(20)
    pushed(relay, name, *said, seal=True)
    got: list[Frame] = []
    while len(got) < len(said):
        after = got[-1].id if got else "start"
        got += go(read(relay.url, name, 3, after=after))
    assert texts(got) == said


def test_p2_a_reader_lives_through_a_relay_that_is_killed(
    fresh_journal: Callable[[], str], name: str, port: int
) -> None:
    journal = fresh_journal()
    frames: list[Frame] = []
    began = threading.Event()

    async def follow(url: str) -> None:
        async for frame in subscribe(url, name, wait_s=30):
            frames.append(frame)
            began.set()

    with RelayProcess.start(journal=journal, port=port) as relay:
        reading = threading.Thread(target=lambda: go(follow(relay.url)), daemon=True)
        reading.start()
        pushed(relay, name, "one")
        assert began.wait(DEADLINE_S)
        relay.kill()
    with RelayProcess.start(journal=journal, port=relay.port) as relay:
        pushed(relay, name, "two", seal=True)
        reading.join(DEADLINE_S)
    assert texts(frames) == ["one", "two"]


def trimmed(relay: RelayProcess, name: str) -> str:
    """A stream of which only the newest four frames are left; a cursor before the loss."""
    ask(relay.port, "PUT", name, {"max_frames": 4})
    first = producing.Producer(relay, name)
    cursor: str = first.push("zero").json["last"]
    first.push(*"123456", end="completed")
    pushed(relay, name, "a", "b", seal=True)
    return cursor


def test_p8_a_loss_is_an_error_that_says_where_to_go_on(relay: RelayProcess, name: str) -> None:
    cursor = trimmed(relay, name)
    with pytest.raises(CursorGone) as gone:
        go(read(relay.url, name, after=cursor))
    assert gone.value.code == "cursor_gone"
    assert gone.value.extra["reason"] == "gap"
    assert texts(go(read(relay.url, name, after=gone.value.extra["cursor"]))) == ["a", "b"]


def test_p8_a_loss_is_a_control_frame_for_who_wants_to_see_them(relay: RelayProcess, name: str) -> None:
    cursor = trimmed(relay, name)
    frames = go(read(relay.url, name, after=cursor, control="events"))
    assert kinds(frames)[:3] == ["hello", "gap", "run.started"]
    assert texts(frames) == ["a", "b"]


def test_p8_another_life_of_the_stream_is_a_reset(relay: RelayProcess, name: str) -> None:
    pushed(relay, name, "one", "two", "three")
    cursor = go(read(relay.url, name, 3))[-1].id
    ask(relay.port, "DELETE", name)
    pushed(relay, name, "new", seal=True)
    with pytest.raises(CursorGone) as gone:
        go(read(relay.url, name, after=cursor))
    assert gone.value.extra["reason"] == "recreated"
    assert texts(go(read(relay.url, name, after=gone.value.extra["cursor"]))) == ["new"]
    frames = go(read(relay.url, name, after=cursor, control="events"))
    assert ("reset" in kinds(frames), texts(frames)) == (True, ["new"])


def test_p8_a_stream_that_is_deleted_while_it_is_read_is_an_error(relay: RelayProcess, name: str) -> None:
    pushed(relay, name, "one")

    async def follow() -> None:
        async for frame in subscribe(relay.url, name):
            assert frame.data == "one"
            await asyncio.to_thread(ask, relay.port, "DELETE", name)

    with pytest.raises(UnknownStream, match="was deleted"):
        go(follow())


def test_what_cannot_be_read_is_said_by_code(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    with pytest.raises(UnknownStream):
        go(read(relay.url, name))
    with pytest.raises(UnknownStream, match="not created in time"):
        go(read(relay.url, name, wait_s=0.01))
    pushed(relay, name, "one")
    with pytest.raises(UnknownRun) as unknown:
        go(read(relay.url, name, run="nobody"))
    assert (unknown.value.code, unknown.value.status) == ("unknown_run", 404)
    with pytest.raises(MalformedCursor):
        go(read(relay.url, name, after="x"))
    with pytest.raises(Refused) as other:
        go(read(upstream.url, name))
    assert (other.value.code, other.value.status) == ("not_relay", 404)
    problem = b'{"title": "No", "status": 403, "code": "not_known_here", "detail": "Not you.", "who": "you"}'
    with pytest.raises(Refused, match=r"Not you\.") as refused:
        go(read(fake(upstream, name, ("403 Forbidden", problem)), name))
    assert (refused.value.code, refused.value.status, refused.value.title) == ("not_known_here", 403, "No")
    assert refused.value.extra == {"who": "you"}


def test_who_cannot_reach_a_relay_is_told_why(
    relay: RelayProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*asked: object, **more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    reasons = {
        "http://127.0.0.1:1": r"Nothing answers at http://127\.0\.0\.1:1\.",
        relay.url.replace("http:", "https:"): "cannot be reached by TLS: .*SSL",
        "http://relay.example": "There is no host 'relay.example'",
        **dict.fromkeys(("nonsense", "localhost:8080", "ftp://127.0.0.1", "http://"), "is not a URL"),
    }
    for url, reason in reasons.items():
        with pytest.raises(Unreachable, match=reason):
            go(read(url, name))


def test_p2_what_comes_twice_is_read_once_and_a_hole_is_said(upstream: ScriptedUpstream, name: str) -> None:
    """Whatever is between relay and us."""
    twice = [notice("hello", "0-0"), line(1, "a"), line(2, "b")], [line(2, "b"), line(3, "c"), ENDED]
    assert texts(go(read(fake(upstream, name, *twice), name))) == ["a", "b", "c"]
    holed = [notice("hello", "0-0"), line(1, "a"), notice("hello", "2-1"), line(3, "c"), ENDED]
    url = fake(upstream, name, holed)
    with pytest.raises(CursorGone, match="between 1 and 3") as gone:
        go(read(url, name))
    assert gone.value.extra["cursor"] == "1-1"
    assert texts(go(read(url, name, 1))) == ["a"]


class Pauses:
    """Every pause is over at once, and as long as it may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[float] = []
        at_once = asyncio.sleep

        async def sleep(delay_s: float) -> None:
            self.said.append(round(delay_s, 3))
            await at_once(0)

        monkeypatch.setattr(client.asyncio, "sleep", sleep)
        monkeypatch.setattr(client.random, "uniform", lambda least, most: most)


def test_a_refusal_that_passes_is_asked_again_when_it_says(
    upstream: ScriptedUpstream, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And backoff begins anew after an answer; relay's own `bye` says when to come back."""
    pauses = Pauses(monkeypatch)
    monkeypatch.setattr(client, "RETRY_S", 1.0)
    monkeypatch.setattr(client, "RETRY_MAX_S", 5.0)
    said = [(f"{status} Later", b"{}", "Retry-After: 7") for status in (408, 425, 429, 503)]
    unsaid = [("503 Later", b"{}"), ("502 Later", b"{}")]
    url = fake(
        upstream,
        name,
        *said,
        *unsaid,
        [notice("hello", "0-0"), line(1, "a"), notice("bye", reason="rotate", retry_ms=1500)],
        ("503 Later", b"{}"),
        [line(2, "b"), ENDED],
    )
    assert texts(go(read(url, name))) == ["a", "b"]
    assert pauses.said == [8.0, 8.0, 8.0, 8.0, 5.0, 5.0, 1.5, 1.0]


def test_what_is_refused_for_too_long_is_given_up(upstream: ScriptedUpstream, name: str) -> None:
    problem = b'{"title": "Busy", "status": 503, "code": "busy", "detail": "Not now."}'
    url = fake(upstream, name, ("503 Later", problem, "Retry-After: 9"))
    with pytest.raises(RelayError, match="Not now") as refused:
        go(read(url, name, give_up_s=5))
    assert refused.value.code == "busy"
    dated = fake(upstream, name, ("503 Later", problem, "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT"))
    with pytest.raises(RelayError, match="Not now"):
        go(read(dated, name, give_up_s=5))


def test_a_connection_that_is_silent_is_left(upstream: ScriptedUpstream, name: str) -> None:
    path, asked = f"/relay/v1/streams/{name}/events", []

    async def handler(exchange: Exchange) -> None:
        asked.append(exchange.received.header("last-event-id"))
        await exchange.head("200 OK", "application/x-ndjson")
        if asked[-1] is None:
            await exchange.chunk(json.dumps(line(1, "a")).encode() + b"\n" + b'{"id": "2-')
            await exchange.closed()
        else:
            await exchange.chunk(
                b"".join(json.dumps(each).encode() + b"\n" for each in (line(2, "b"), ENDED))
            )
            await exchange.end()

    upstream.on(path, handler)
    assert texts(go(read(upstream.url, name, silence_s=0.2))) == ["a", "b"]
    # Where we are slow it may be left more often.
    assert (asked[0], asked[-1], set(asked)) == (None, "1-1", {None, "1-1"})


# --- pushing ------------------------------------------------------------------------------------------


async def push_all(url: str, stream: str, *data: Any, **wishes: Any) -> Producer:
    async with Producer(url, stream, **wishes) as producer:
        for item in data:
            await producer.send(item)
    return producer


def test_a_run_is_pushed_and_completed(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        async with Producer(relay.url, name, metadata={"a": 1}) as producer:
            await producer.send("one", "say")
            await producer.send({"any": ["json", 1]})
            await producer.flush()
            assert texts(await read(relay.url, name, 2)) == ["one", '{"any":["json",1]}']
            assert producer.next_seq == 3
            await producer.send("")

    go(push())
    record = whole_run(relay, name)
    assert [(frame.event, frame.data) for frame in record.frames][:2] == [
        ("say", "one"),
        ("", '{"any":["json",1]}'),
    ]
    assert record.outcome == ("completed", "producer_end")
    assert record.ended["frames"] == 3
    assert relay.json(f"/relay/v1/streams/{name}/runs/latest")["metadata"] == {"a": 1}


def test_p3_a_block_that_raises_fails_the_run_with_what_was_given(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        async with Producer(relay.url, name) as producer:
            await producer.send("one")
            raise ValueError("The model is out of order.")

    with pytest.raises(ValueError, match="out of order"):
        go(push())
    record = whole_run(relay, name)
    assert record.texts == ["one"]
    assert record.outcome == ("failed", "producer_failed")
    assert record.ended["error"] == "The model is out of order."


def test_p3_a_block_that_is_cancelled_from_outside_stays_cancelled(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        waiting = asyncio.Event()

        async def block() -> None:
            async with Producer(relay.url, name) as producer:
                await producer.send("one")
                waiting.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    go(push())
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["one"], ("failed", "producer_failed"))


def test_a_run_is_ended_before_its_block_is(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        async with Producer(relay.url, name) as producer:
            await producer.send("one")
            await producer.end(reason="input_required")
            with pytest.raises(RunEnded):
                await producer.send("two")

    go(push())
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["one"], ("completed", "input_required"))


def test_p7_a_cancel_interrupts_a_block_that_waits(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        async with Producer(relay.url, name) as producer:
            await producer.send("one")
            await producer.flush()
            ended = await cancel(relay.url, name, reason="Enough.")
            assert (ended["run"], ended["status"]) == (producer.run, "cancelled")
            await asyncio.wait_for(asyncio.Event().wait(), DEADLINE_S / 2)

    with pytest.raises(RunEnded) as over:
        go(push())
    assert (over.value.extra["run_status"], over.value.extra["reason"]) == ("cancelled", "client_cancel")
    assert whole_run(relay, name).ended["error"] == "Enough."
    assert go(cancel(relay.url, name)) == {"stream": name, "run": None}


def test_a_cancellation_from_outside_stays_one_when_the_run_is_over_too(
    relay: RelayProcess, name: str
) -> None:
    async def push() -> None:
        async with Producer(relay.url, name):
            try:
                await cancel(relay.url, name)
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.Event().wait()

    async def both() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(push())

    go(both())


def test_p4_a_run_that_was_taken_over_is_left_alone(relay: RelayProcess, name: str) -> None:
    async def push(taking: list[asyncio.Task[None]]) -> None:
        async with Producer(relay.url, name) as first:
            await first.send("one")
            await first.flush()
            # In a task of its own: the first's is cancelled when it hears of it, which may be at any time.
            taking.append(asyncio.create_task(second(first.run)))
            await asyncio.wait(taking)
            await first.send("late")

    async def second(run: str) -> None:
        async with Producer(relay.url, name, run=run, take_over=True) as taken:
            assert taken.next_seq == 2
            await taken.send("two")

    async def both() -> None:
        taking: list[asyncio.Task[None]] = []
        with pytest.raises((Fenced, RunEnded)):
            await push(taking)
        await taking[0]

    go(both())
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["one", "two"], ("completed", "producer_end"))


def test_p4_a_producer_that_is_fenced_hears_it(relay: RelayProcess, name: str) -> None:
    async def push() -> None:
        async with Producer(relay.url, name) as first:
            await asyncio.to_thread(ask, relay.port, "POST", f"{name}/runs/{first.run}/writer")
            await first.send("late")
            await asyncio.Event().wait()

    with pytest.raises(Fenced) as fenced:
        go(push())
    assert fenced.value.code == "fenced"
    run = relay.json(f"/relay/v1/streams/{name}/runs/latest")
    assert (run["status"], run["frames"]) == ("open", 0)


def test_a_producer_goes_on_where_its_run_is(relay: RelayProcess, name: str) -> None:
    producing.Producer(relay, name, run="mine").push("one", "two", Relay_Seq="1")
    go(push_all(relay.url, name, "three", run="mine"))
    assert whole_run(relay, name).texts == ["one", "two", "three"]
    with pytest.raises(RunEnded) as over:
        go(push_all(relay.url, name, run="mine"))
    assert over.value.extra["run_status"] == "completed"


def test_p5_frames_that_are_given_again_from_the_first_are_journaled_once(
    relay: RelayProcess, name: str
) -> None:
    producing.Producer(relay, name, run="mine").push("one", "two", Relay_Seq="1")
    go(push_all(relay.url, name, "one", "two", "three", run="mine", from_first=True))
    assert whole_run(relay, name).texts == ["one", "two", "three"]


def test_p5_what_is_pushed_over_connections_that_break_is_journaled_once(
    relay: RelayProcess, name: str
) -> None:
    """Also when only the answer is lost."""
    said, cuts = words(60), random.Random(3)

    async def push(breaking: TcpProxy) -> None:
        async with Producer(breaking.url, name) as producer:
            breaking.plan = lambda number: cuts.randrange(1, 400) if number < 60 else None
            breaking.plan_to_server = lambda number: cuts.randrange(1, 4000) if number < 60 else None
            breaking.cut_all()
            for each in said:
                await producer.send(each)
                if cuts.random() < 0.3:
                    await producer.flush()

    with TcpProxy.running(relay.port) as breaking:
        go(push(breaking))
        assert breaking.connections > 10
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (said, ("completed", "producer_end"))


def test_p5_a_push_goes_on_when_relay_was_killed(
    fresh_journal: Callable[[], str], name: str, port: int
) -> None:
    """With a journal of its own kind: a run of Redis outlives the relay that took it."""
    journal, said = fresh_journal(), words(30)
    relays = [RelayProcess.start(journal=journal, port=port)]

    async def push() -> None:
        async with Producer(relays[0].url, name) as producer:
            for number, each in enumerate(said):
                await producer.send(each)
                if number == 10:
                    await asyncio.to_thread(relays[0].kill)
                    restarting = asyncio.create_task(
                        asyncio.to_thread(RelayProcess.start, journal=journal, port=port)
                    )
            relays.append(await restarting)

    try:
        go(push())
        record = whole_run(relays[-1], name)
    finally:
        for each in relays:
            each.stop()
    assert (record.texts, record.outcome) == (said, ("completed", "producer_end"))


def test_p5_a_push_waits_for_a_journal_that_is_away(name: str) -> None:
    server = RedisServer.start()
    said = words(20)

    async def push(relay: RelayProcess) -> None:
        async with Producer(relay.url, name) as producer:
            for number, each in enumerate(said):
                if number == 10:
                    server.pause()
                await producer.send(each)
            refused = await asyncio.to_thread(ask, relay.port, "GET", f"{name}-other")
            server.resume()
            assert refused.problem == (503, "journal_unavailable")

    try:
        with RelayProcess.start(journal=server.url(), journal_timeout_s=1) as relay:
            go(push(relay))
            record = whole_run(relay, name)
    finally:
        server.stop()
    assert (record.texts, record.outcome) == (said, ("completed", "producer_end"))


def test_p6_a_producer_holds_no_more_than_two_batches(
    relay: RelayProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BATCH_MAX_FRAMES", 5)

    async def push(proxy: TcpProxy) -> None:
        async with Producer(proxy.url, name) as producer:
            proxy.refusing = True
            proxy.cut_all()

            async def send() -> None:
                for number in range(100):
                    await producer.send(str(number))

            sending = asyncio.create_task(send())
            for _ in range(1000):
                await asyncio.sleep(0)
            assert 5 < producer.next_seq <= 11
            proxy.refusing = False
            await sending

    with TcpProxy.running(relay.port) as proxy:
        go(push(proxy))
    assert whole_run(relay, name).texts == [str(number) for number in range(100)]


def test_a_silent_producer_is_kept_alive(fresh_journal: Callable[[], str], name: str) -> None:
    """Longer than another one of the same patience that says nothing. Nobody else looks for silent runs here:
    while the relay that hears of them is held up, another one would find both."""

    async def push(relay: RelayProcess) -> None:
        async with Producer(relay.url, name, idle_timeout_s=1) as producer:
            silent = await asyncio.to_thread(producing.Producer, relay, f"{name}-silent", idle_timeout_s=1)
            ended = await read(relay.url, silent.stream, run=silent.run, control="events")
            assert '"idle_timeout"' in ended[-2].data
            await producer.send("one")

    with RelayProcess.start(journal=fresh_journal(), redis_prefix=name, owner_lease_s=1.5) as relay:
        go(push(relay))
        record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["one"], ("completed", "producer_end"))


def test_what_cannot_be_pushed_is_said_by_code(relay: RelayProcess, name: str) -> None:
    opened = producing.Producer(relay, name)
    with pytest.raises(StreamBusy) as busy:
        go(push_all(relay.url, name, if_busy="reject"))
    assert busy.value.extra["open_runs"] == [opened.run]
    with pytest.raises(UnknownRun):
        go(push_all(relay.url, name, run="nobody", take_over=True))
    with pytest.raises(InvalidParameter):
        Producer(relay.url, name, take_over=True)
    with pytest.raises(Unreachable, match="Nothing answers"):
        go(push_all("http://127.0.0.1:1", name))
    for data in (None, object()):
        with pytest.raises(InvalidEvent):
            go(push_all(relay.url, name, data, run=f"r-{data is None}"))
    assert whole_run(relay, name, "r-True").outcome == ("failed", "producer_failed")


def test_p3_a_frame_that_is_refused_fails_the_run(relay: RelayProcess, name: str) -> None:
    """Also when the block is over by then."""
    with pytest.raises(FrameTooLarge):
        go(push_all(relay.url, name, "one", "x" * 2**21))
    assert whole_run(relay, name).outcome == ("failed", "producer_failed")


# --- asking -------------------------------------------------------------------------------------------


def test_transcripts_and_a_session_of_the_callers(relay: RelayProcess, name: str) -> None:
    run = pushed(relay, name, "one", "two").run

    async def look() -> None:
        async with aiohttp.ClientSession() as session:
            said = await transcript(relay.url, name, session=session)
            assert (said["run"], said["text"], said["status"]) == (run, "onetwo", "completed")
            assert await transcript(relay.url, name, run, session=session) == said
            ended = await cancel(relay.url, name, run, session=session)
            assert ended["status"] == "completed"
            assert not session.closed
        with pytest.raises(UnknownRun):
            await transcript(relay.url, name, "nobody")

    go(look())


# --- the README ---------------------------------------------------------------------------------------


def examples() -> Iterator[str]:
    """The code blocks of the README's part on Python."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (part,) = re.findall(r"^## In Python\n(.*?)^## ", readme, re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_readme_do_what_they_say(relay: RelayProcess, name: str) -> None:
    push, follow = examples()
    said = []
    for example in (push, follow):
        assert "http://127.0.0.1:8080" in example
        assert '"job-1"' in example
        text = example.replace("http://127.0.0.1:8080", relay.url).replace('"job-1"', f'"{name}"')
        outcome = subprocess.run(
            [sys.executable, "-W", "error", "-c", text], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")
        said.append(outcome.stdout)
    assert said == ["", "Hello from Python"]
    assert whole_run(relay, name).outcome == ("completed", "producer_end")
