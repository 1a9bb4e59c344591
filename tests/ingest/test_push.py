"""relay.ingest.push: a producer's frames are journaled once, in its order, whatever gets lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from deaf_follower import DeafFollower
from own_journal import own_journal
from producing import DEADLINE_S, Answer, LongBody, Producer, ask
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from rewinding import rewinding
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from relay.cursor import ORIGIN
from relay.errors import Busy, JournalUnavailable, Rewound, RunEnded, SequenceGap
from relay.frame import Event
from relay.ingest import push
from relay.ingest.formats import Lines
from relay.ingest.owned import OwnedRuns
from relay.ingest.proxy import ClientGone, RunWishes
from relay.ingest.push import APPEND_MAX_FRAMES, Piece, Pushes, PushOpening
from relay.journal.base import Append, Appended, Ended, Opened, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Ending, Reason, ending
from relay.settings import Settings


def following(relay: RelayProcess, stream: str) -> Iterator[str]:
    """Data of the stream's frames as they come, control frames by their type. What does not come fails: the
    heartbeats would keep it waiting for ever."""
    deadline = time.monotonic() + DEADLINE_S
    url = f"{relay.url}/relay/v1/streams/{stream}/events?wait=60&heartbeat=event"
    with Reading(url) as reading:
        for block in reading.blocks():
            assert time.monotonic() < deadline
            yield block.data if block.control is None else f"<{block.control['type']}>"


def until(seen: Iterator[str], last: str) -> list[str]:
    frames = []
    for frame in seen:
        frames.append(frame)
        if frame == last:
            return frames
    raise AssertionError(f"no {last} in {frames}")


# --- responses get lost ---------------------------------------------------------------------------------


def insist(ask_once: Callable[[], Answer]) -> tuple[Answer, int]:
    """Ask until there is an answer; how often that took."""
    for tries in range(1, 50):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return ask_once(), tries
    raise AssertionError("no answer")


def test_p5_a_producer_that_loses_every_third_response_and_retries_is_journaled_once(
    relay: RelayProcess, name: str
) -> None:
    # One byte passes, so the request was answered: what is lost is only the answer.
    with TcpProxy.running(relay.port, plan=lambda number: 1 if number % 3 == 2 else None) as lossy:
        key = secrets.token_hex(8)
        opened, tried = insist(lambda: ask(lossy.port, "POST", f"{name}/runs", {}, Idempotency_Key=key))
        run, writer = opened.json["run"], opened.json["writer"]
        sent, seq, tries = [], 1, [tried]
        for batch in range(12):
            frames = [{"data": f"{batch}.{n}"} for n in range(5)]
            sent += [frame["data"] for frame in frames]
            query = "?end=completed" if batch == 11 else ""

            def push(frames: Any = frames, seq: int = seq, query: str = query) -> Answer:
                path = f"{name}/runs/{run}/frames{query}"
                return ask(lossy.port, "POST", path, frames, Relay_Writer=writer, Relay_Seq=str(seq))

            if query:
                while lossy.connections % 3 != 2:  # the final answer is one of those that get lost
                    ask(lossy.port, "POST", f"{name}/runs/{run}/heartbeat", Relay_Writer=writer)
            answer, tried = insist(push)
            tries.append(tried)
            assert answer.status == 200, answer
            got = answer.json
            assert got["appended"] + got["duplicates"] == 5
            assert (got["duplicates"] > 0) == (tried > 1)
            seq = got["next_seq"]
            assert seq == len(sent) + 1
    assert max(tries[1:-1]) > 1
    assert tries[-1] == 2
    assert (got["status"], got["reason"]) == ("completed", "producer_end")
    record = whole_run(relay, name)
    assert record.texts == sent
    assert record.ended["frames"] == len(sent)
    assert record.outcome == ("completed", "producer_end")


@pytest.mark.parametrize("status", ["failed", "completed"])
@pytest.mark.parametrize("how", ["end", "frames"])
def test_who_reads_a_taken_over_run_as_upstreams_answer_is_told_in_its_format_that_it_failed(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, how: str, status: str
) -> None:
    chunk = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(chunk)
        await exchange.closed()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as answer:
        answer.take(1)
        path = f"{name}/runs/{answer.headers['relay-run']}"
        writer = ask(relay.port, "POST", f"{path}/writer").json["writer"]
        if how == "end":
            ended = ask(relay.port, "POST", f"{path}/end", {"status": status}, Relay_Writer=writer)
            assert ended.json["appended"] == 0
        else:
            frames = [{"data": "two"}]
            ended = ask(relay.port, "POST", f"{path}/frames?end={status}", frames, Relay_Writer=writer)
            assert (ended.json["appended"], ended.json["first"]) == (1, ended.json["last"])
        said = [block.data for block in answer.blocks()]
    record = whole_run(relay, name)
    assert record.texts[1:] == said
    assert record.ended["frames"] == 1 + ended.json["appended"], "what relay says itself is not counted"
    told = [json.loads(text)["error"]["code"] for text in said if "error" in text]
    assert told == ([] if status == "completed" else ["producer_failed"])


def test_a_skipped_number_is_a_gap_and_says_what_is_expected(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    assert producer.push("one", "two", Relay_Seq="1").json["next_seq"] == 3
    gap = producer.push("four", Relay_Seq="4")
    assert gap.problem == (409, "sequence_gap")
    assert (gap.json["expected"], gap.json["next_seq"], gap.json["appended"]) == (3, 3, 0)
    assert producer.push(end="completed", Relay_Seq="4").problem == (409, "sequence_gap")
    done = producer.push("two", "three", "four", end="completed", Relay_Seq="2").json
    assert (done["appended"], done["duplicates"], done["next_seq"]) == (2, 1, 5)
    assert whole_run(relay, name).texts == ["one", "two", "three", "four"]


def test_p4_an_old_writer_token_is_fenced_and_the_takeover_goes_on_at_next_seq(
    relay: RelayProcess, name: str
) -> None:
    old = Producer(relay, name)
    old.push("one", "two", Relay_Seq="1")
    taken = ask(relay.port, "POST", f"{name}/runs/{old.run}/writer").json
    assert taken["next_seq"] == 3
    assert taken["cursor"] == old.opened.json["cursor"]
    for refused in (
        old.push("late", Relay_Seq="3"),
        old.push("late"),
        old.push(end="completed"),
        old.ask("end", {"status": "failed"}),
        old.ask("heartbeat"),
    ):
        assert refused.problem == (409, "fenced")
    old.writer = taken["writer"]
    assert old.push("three", end="completed", Relay_Seq="3").status == 200
    assert whole_run(relay, name).texts == ["one", "two", "three"]


def test_p4_a_second_producer_cannot_interleave_with_a_long_body(relay: RelayProcess, name: str) -> None:
    first = Producer(relay, name, run="turn")
    seen = following(relay, name)
    with first.body() as body:
        body.lines("one", "two")
        until(seen, "two")
        second = Producer(relay, name, run="turn")
        assert (second.opened.status, second.opened.json["next_seq"]) == (200, 3)
        assert second.push("three", Relay_Seq="3").status == 200
        body.lines("intruder")
        answer = body.answer()
    assert (answer.status, answer.problem["code"]) == (409, "fenced")
    assert (answer.problem["appended"], answer.problem["next_seq"]) == (2, 3)
    second.push(end="completed")
    assert whole_run(relay, name).texts == ["one", "two", "three"]


def test_a_producer_that_opens_again_after_the_end_learns_how_it_ended(
    relay: RelayProcess, name: str
) -> None:
    for given in ({"body": {"run": "mine"}}, {"body": {}, "Idempotency_Key": "k"}):
        opened = ask(relay.port, "POST", f"{name}/runs", **given)
        assert opened.status == 201
        path = f"{name}/runs/{opened.json['run']}/frames?end=failed"
        ended = ask(relay.port, "POST", path, [{"data": "x"}], Relay_Writer=opened.json["writer"])
        assert (ended.json["status"], ended.json["reason"]) == ("failed", "producer_failed")
        again = ask(relay.port, "POST", f"{name}/runs", **given)
        assert again.status == 200
        assert "writer" not in again.json
        told = {key: again.json[key] for key in ("run", "status", "reason", "cursor", "next_seq")}
        assert told == {
            "run": opened.json["run"], "status": "failed", "reason": "producer_failed",
            "cursor": opened.json["cursor"], "next_seq": 2,
        }  # fmt: skip


def test_one_key_is_one_run_for_one_caller_and_one_body(relay: RelayProcess, name: str) -> None:
    def opening(key: str, body: Any, **headers: str) -> Answer:
        return ask(relay.port, "POST", f"{name}/runs", body, Idempotency_Key=key, **headers)

    first = opening("a", {"metadata": 1})
    again = opening("a", {"metadata": 1})
    assert (first.status, again.status) == (201, 200)
    assert again.json["run"] == first.json["run"]
    assert again.json["writer"] != first.json["writer"]
    assert opening("a", {"metadata": 2}).problem == (422, "idempotency_key_reused")
    others = [
        opening("b", {"metadata": 1}),
        opening("a", {"metadata": 1}, Authorization="Bearer other"),
        opening("a", {"metadata": 1}, Cookie="who=other"),
        ask(relay.port, "POST", f"{name}-2/runs", {"metadata": 1}, Idempotency_Key="a"),
    ]
    assert [other.status for other in others] == [201] * 4
    assert len({first.json["run"], *(other.json["run"] for other in others)}) == 5


# --- formats and what arrives -----------------------------------------------------------------------------


def test_p1_a_long_body_is_journaled_while_it_arrives(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    seen = following(relay, name)
    for media_type, frame in (
        ("application/x-ndjson", lambda word: json.dumps({"data": word}).encode() + b"\n"),
        ("text/event-stream", lambda word: f"data: {word}\n\n".encode()),
        ("application/msgpack", lambda word: msgpack.packb({"data": word})),
    ):
        with producer.body(media_type) as body:
            for n in range(3):
                whole = frame(f"{media_type}.{n}")
                body.send(whole[:5])
                body.send(whole[5:])
                until(seen, f"{media_type}.{n}")  # before the body ends
            answer = json.loads(body.finish().body)
        assert (answer["appended"], answer["duplicates"]) == (3, 0)
    assert answer["next_seq"] == 10


def test_four_formats_give_the_same_frames(relay: RelayProcess, name: str) -> None:
    frames = [{"event": "a", "data": "eins\nzwei"}, {"data": "é\U0001f600"}, {"event": "b", "data": [1, "x"]}]
    events = (
        b'event: a\ndata: eins\ndata: zwei\n\ndata: \xc3\xa9\xf0\x9f\x98\x80\n\nevent: b\ndata: [1,"x"]\n\n'
    )
    bodies = {
        "application/json": json.dumps(frames).encode(),
        "application/x-ndjson": b"".join(json.dumps(frame).encode() + b"\n" for frame in frames),
        "text/event-stream": events,
        "application/msgpack": b"".join(map(msgpack.packb, frames)),
    }
    journaled = []
    for number, (media_type, body) in enumerate(bodies.items()):
        producer = Producer(relay, f"{name}-{number}", dialect="raw")
        done = producer.ask("frames?end=completed", body, Content_Type=media_type, Relay_Seq="1")
        assert done.status == 200, done
        record = whole_run(relay, f"{name}-{number}")
        journaled.append([(frame.event, frame.data) for frame in record.frames])
        assert record.ended["text_bytes"] == len("eins\nzwei") + 6 + 7
        ids = [frame.id for frame in record.frames]
        assert (done.json["first"], done.json["last"]) == (ids[0], ids[-1])
    assert journaled[0] == [("a", "eins\nzwei"), ("", "é\U0001f600"), ("b", '[1,"x"]')]
    assert journaled == [journaled[0]] * 4


def test_frames_read_from_relay_can_be_pushed_back(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    producer.ask("frames?end=completed", [{"event": "e", "data": "one"}, {"data": "two\r\nlines"}])
    path = f"/relay/v1/streams/{name}/events?control=none&run={producer.run}"
    _, _, body = relay.get(path, Accept="application/x-ndjson")
    whole = ask(relay.port, "POST", f"{name}-2/runs?end=completed", body, Content_Type="application/x-ndjson")
    assert whole.status == 201, whole
    frames = whole_run(relay, f"{name}-2").frames
    assert [(frame.event, frame.data) for frame in frames] == [("e", "one"), ("", "two\nlines")]


def test_text_is_counted_as_the_dialect_shows_it(relay: RelayProcess, name: str) -> None:
    def chunk(text: str) -> dict[str, Any]:
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}

    for number, wishes in enumerate(({}, {"dialect": "openai-chat"})):
        producer = Producer(relay, f"{name}-{number}", **wishes)
        producer.push(chunk("Hel"))
        producer.push(chunk("lo"), chunk("é"), end="completed")
        assert whole_run(relay, f"{name}-{number}").ended["text_bytes"] == 7
        assert (
            relay.json(f"/relay/v1/streams/{name}-{number}/runs/{producer.run}")["dialect"] == "openai-chat"
        )


def test_a_batch_larger_than_one_append_is_whole_and_ends_with_its_last_frame(
    relay: RelayProcess, name: str
) -> None:
    words = [str(n) for n in range(2 * APPEND_MAX_FRAMES + 7)]
    done = Producer(relay, name).push(*words, end="completed", Relay_Seq="1").json
    assert (done["appended"], done["next_seq"]) == (len(words), len(words) + 1)
    record = whole_run(relay, name)
    assert record.texts == words
    assert (done["first"], done["last"]) == (record.frames[0].id, record.frames[-1].id)


@pytest.mark.parametrize("numbered", [True, False])
def test_what_was_accepted_before_an_error_stays_and_the_producer_knows_where_to_go_on(
    relay: RelayProcess, name: str, numbered: bool
) -> None:
    producer = Producer(relay, name)
    headers = {"Relay_Seq": "1"} if numbered else {}
    lines = b'{"data":"one"}\n{"data":"two"}\nnonsense\n{"data":"three"}\n'
    media_type = "application/x-ndjson"
    refused = producer.ask("frames?end=completed", lines, Content_Type=media_type, **headers)
    assert refused.problem == (400, "invalid_event")
    assert (refused.json["frame"], refused.json["appended"], refused.json["next_seq"]) == (3, 2, 3)
    assert relay.json(f"/relay/v1/streams/{name}/runs/{producer.run}")["status"] == "open"
    assert producer.push("three", end="completed").status == 200
    record = whole_run(relay, name)
    assert record.texts == ["one", "two", "three"]
    assert refused.json["last"] == record.frames[1].id


def test_a_json_batch_with_a_bad_frame_is_refused_whole(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    assert producer.push("one", None, end="completed").problem == (400, "invalid_event")
    assert producer.push("one", "x" * (1024 * 1024 + 1)).problem == (413, "frame_too_large")
    assert producer.push("one", end="completed").status == 200
    assert whole_run(relay, name).texts == ["one"]


def test_a_body_that_breaks_off_ends_nothing_and_keeps_what_came(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    seen = following(relay, name)
    with producer.body(query="?end=completed") as body:
        body.lines("one")
        body.send(b'{"data":"tw')
        until(seen, "one")
    assert producer.push("two", end="completed", Relay_Seq="2").status == 200
    assert whole_run(relay, name).texts == ["one", "two"]


def test_an_empty_body_can_end_a_run_and_be_said_again(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    producer.push("one")
    before = relay.metric('relay_runs_ended_total{reason="producer_end",status="completed"}')
    for _ in range(2):
        ended = producer.ask("frames?end=completed")
        assert (ended.status, ended.json["status"], ended.json["next_seq"]) == (200, "completed", 2)
    assert relay.metric('relay_runs_ended_total{reason="producer_end",status="completed"}') == before + 1
    assert producer.ask("frames?end=failed").problem == (409, "run_ended")
    late = producer.push("late")
    assert late.problem == (409, "run_ended")
    assert (late.json["run_status"], late.json["reason"]) == ("completed", "producer_end")
    assert whole_run(relay, name).texts == ["one"]


def test_no_event_name_or_data_can_forge_a_frame(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    for event in ("a\ndata: forged", "a\r\rdata: forged\r\r", "relay", "a\r"):
        assert producer.ask("frames", [{"event": event, "data": "x"}]).problem == (400, "invalid_event")
    for media_type, body in (
        ("text/event-stream", b"event: relay\ndata: forged\n\n"),
        ("application/msgpack", msgpack.packb({"event": "relay", "data": "forged"})),
        ("application/x-ndjson", b'{"event":"a\\nid: 1","data":"x"}\n'),
    ):
        refused = producer.ask("frames", body, Content_Type=media_type)
        assert refused.problem == (400, "invalid_event")
    data = 'x\n\nevent: relay\ndata: {"type":"run.ended"}\n\n'
    producer.ask("frames?end=completed", [{"event": "id: 9", "data": data}])
    assert [(frame.event, frame.data) for frame in whole_run(relay, name).frames] == [("id: 9", data)]


# --- whole runs in one request ----------------------------------------------------------------------------


def whole(relay: RelayProcess, name: str, query: str = "", *headers: str) -> LongBody:
    target = f"/relay/v1/streams/{name}/runs?end=completed{query}"
    return LongBody(relay.port, target, "application/x-ndjson", *headers)


def test_a_whole_run_is_one_request_journaled_while_it_arrives(relay: RelayProcess, name: str) -> None:
    seen = following(relay, name)
    with whole(relay, name, "&dialect=raw&metadata=%7B%22a%22%3A1%7D&seal=true") as body:
        for word in ("one", "two"):
            body.lines(word)
            until(seen, word)
        answer = body.finish()
    assert answer.status == 201
    done = json.loads(answer.body)
    record = whole_run(relay, name)
    assert record.texts == ["one", "two"]
    assert done == {
        "run": done["run"], "stream": name, "first": record.frames[0].id, "last": record.frames[1].id,
        "appended": 2, "duplicates": 0, "next_seq": 3, "status": "completed", "reason": "producer_end",
    }  # fmt: skip
    info = relay.json(f"/relay/v1/streams/{name}/runs/{done['run']}")
    assert (info["metadata"], info["dialect"]) == ({"a": 1}, "raw")
    assert relay.json(f"/relay/v1/streams/{name}")["sealed"] is True


def test_p3_a_whole_run_that_breaks_off_is_truncated_never_complete(relay: RelayProcess, name: str) -> None:
    seen = following(relay, name)
    with whole(relay, name) as body:
        body.lines("one")
        until(seen, "one")
        body.send(b'{"data":"tw')
    record = whole_run(relay, name)
    assert record.texts == ["one"]
    assert record.outcome == ("failed", "upstream_truncated")


@pytest.mark.parametrize(
    ("headers", "query"), [(("Idempotency-Key: one",), ""), ((), "&run=mine")], ids=["key", "run"]
)
def test_p5_a_whole_run_that_breaks_off_is_sent_again_and_journaled_once(
    relay: RelayProcess, name: str, headers: tuple[str, ...], query: str
) -> None:
    seen = following(relay, name)
    with whole(relay, name, query, *headers) as body:
        body.lines("one", "two")
        until(seen, "two")
    with whole(relay, name, query, *headers) as body:
        body.lines("one", "two", "three")
        again = body.finish()
    assert again.status == 200
    done = json.loads(again.body)
    assert (done["appended"], done["duplicates"], done["status"]) == (1, 2, "completed")
    with whole(relay, name, query, *headers) as body:
        once_more = json.loads(body.finish().body)
    assert (once_more["appended"], once_more["status"], once_more["next_seq"]) == (0, "completed", 4)
    record = whole_run(relay, name)
    assert record.texts == ["one", "two", "three"]
    assert record.outcome == ("completed", "producer_end")


@pytest.mark.parametrize("query", ["", "&run=mine"])
@pytest.mark.parametrize(
    ("line", "status", "code", "reason"),
    [
        (b"nonsense\n", 400, "invalid_event", "invalid_frame"),
        (b'{"event":"relay","data":"x"}\n', 400, "invalid_event", "invalid_frame"),
        (json.dumps({"data": "x" * 1024 * 1025}).encode(), 413, "frame_too_large", "frame_too_large"),
    ],
)
def test_p3_a_whole_run_with_a_bad_frame_fails(
    relay: RelayProcess, name: str, query: str, line: bytes, status: int, code: str, reason: str
) -> None:
    refused = ask(
        relay.port, "POST", f"{name}/runs?end=completed{query}",
        b'{"data":"one"}\n' + line, Content_Type="application/x-ndjson",
    )  # fmt: skip
    assert refused.problem == (status, code)
    assert (refused.json["appended"], refused.json["next_seq"], refused.json["frame"]) == (1, 2, 2)
    record = whole_run(relay, name, refused.json["run"])
    assert (record.texts, record.outcome) == (["one"], ("failed", reason))


def test_a_cancel_closes_the_request_of_a_whole_run(relay: RelayProcess, name: str) -> None:
    seen = following(relay, name)
    with whole(relay, name) as body:
        body.lines("one")
        until(seen, "one")
        assert ask(relay.port, "POST", f"{name}/cancel").json["status"] == "cancelled"
        answer = body.answer()
    assert (answer.status, answer.problem["code"]) == (409, "run_ended")
    assert (answer.problem["run_status"], answer.problem["reason"]) == ("cancelled", "client_cancel")
    assert (answer.problem["appended"], answer.problem["next_seq"]) == (1, 2)
    assert whole_run(relay, name).outcome == ("cancelled", "client_cancel")


def test_p3_a_relay_that_shuts_down_gives_whole_runs_the_grace_and_sends_other_bodies_on(
    fresh_journal: Callable[[], str], name: str
) -> None:
    journal = fresh_journal()
    with RelayProcess.start(journal=journal, drain_grace_s=60) as relay:
        producer = Producer(relay, name)
        seen = following(relay, name)
        with producer.body() as body, whole(relay, name + "-kept") as kept:
            body.lines("one", "two")
            until(seen, "two")
            kept.lines("one")
            until(following(relay, name + "-kept"), "one")
            relay.process.send_signal(signal.SIGTERM)
            answer = body.answer()
            assert (answer.status, answer.problem["code"]) == (503, "busy")
            assert (answer.problem["appended"], answer.problem["next_seq"]) == (2, 3)
            kept.lines("two")
            assert kept.finish().status == 201
            relay.process.wait(60)
    # Who is to be in time has a long grace, and who is not to be has a short one.
    with RelayProcess.start(journal=journal, drain_grace_s=0.1) as relay:
        producer.port = relay.port
        assert producer.push("three", end="completed", Relay_Seq="3").status == 200
        assert whole_run(relay, name).texts == ["one", "two", "three"]
        assert whole_run(relay, name + "-kept").outcome == ("completed", "producer_end")
        with whole(relay, name + "-left") as left:
            left.lines("one")
            until(following(relay, name + "-left"), "one")
            relay.process.send_signal(signal.SIGTERM)
            answer = left.answer()
            assert (answer.status, answer.problem["code"]) == (503, "busy")
            relay.process.wait(60)

    async def left_as() -> tuple[str, str]:
        async with own_journal(journal, "relay") as opened:
            (run,) = await opened.runs(name + "-left", "", 10)
            return run.status, run.reason

    assert asyncio.run(left_as()) == ("lost", "shutdown")


# --- a journal whose answers get lost ---------------------------------------------------------------------


class Lossy(SqliteJournal):
    """A real journal that does what it is asked and, while there are `losses` of an operation, says that it
    is away."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.losses = {"append": 0, "open_run": 0, "end_run": 0}

    def _lose(self, operation: str) -> None:
        if self.losses[operation]:
            self.losses[operation] -= 1
            raise JournalUnavailable("no answer")

    async def append(self, batch: Append) -> Appended:
        appended = await super().append(batch)
        self._lose("append")
        return appended

    async def open_run(self, opening: RunOpening) -> Opened:
        opened = await super().open_run(opening)
        self._lose("open_run")
        return opened

    async def end_run(self, *arguments: Any, **options: Any) -> Ended:
        ended = await super().end_run(*arguments, **options)
        self._lose("end_run")
        return ended


class Scene:
    """Pushes into a lossy journal, and the endings they told of."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.journal = Lossy(path / "relay.db")
        self.endings: list[tuple[str, str]] = []
        self.ended = asyncio.Event()
        self.settings = Settings(**settings)
        self.owned = OwnedRuns(self.settings, self._on_ended)
        self.pushes = Pushes(self.journal, self.settings, self.owned, self._on_ended)

    def _on_ended(self, stream: str, run: str, end: Ending, *_: object) -> None:
        self.endings.append((run, end.reason))
        self.ended.set()

    async def texts(self) -> list[bytes]:
        page = await self.journal.read("s", ORIGIN, 1000, 10**6)
        return [frame.data for frame in page.frames if not frame.is_control]

    async def push(self, turn: Any, seq: int, *data: bytes, end: Ending | None = None) -> Any:
        events = [Event("", item) for item in data]
        return await self.pushes.push("s", turn.run, turn.writer, seq, events, nothing, end)

    async def whole(self, run: str, *pieces: bytes | Exception) -> Any:
        opening = PushOpening("s", RunWishes(run=run))
        return await self.pushes.push_whole(opening, Lines(100), bringing(*pieces), COMPLETED)


COMPLETED = ending(Reason.PRODUCER_END)


async def nothing() -> Piece:
    raise AssertionError("nobody is to be asked")


def bringing(*pieces: bytes | Exception) -> Callable[[], Awaitable[Piece]]:
    """A body of these pieces; an exception breaks it off, and after the last one it is waited for ever."""
    left = list(pieces)

    async def next_piece() -> Piece:
        if not left:
            await asyncio.Event().wait()
        piece = left.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return Piece(piece, piece == b"")

    return next_piece


def check(scene: Callable[[Scene], Awaitable[None]], path: Path, **settings: Any) -> None:
    async def play() -> None:
        play = Scene(path, **settings)
        await play.journal.start(DeafFollower(), play.owned)
        try:
            async with asyncio.timeout(60):
                await scene(play)
        finally:
            play.pushes.close()
            await play.journal.close()

    asyncio.run(play())


def test_p5_numbered_frames_are_sent_again_by_relay_and_unnumbered_ones_are_not(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        turn = await scene.pushes.open(PushOpening("s", RunWishes()))
        scene.journal.losses["append"] = 2
        assert (await scene.push(turn, 1, b"one", b"two")).next_seq == 3
        scene.journal.losses["append"] = 1
        with pytest.raises(JournalUnavailable) as raised:
            await scene.push(turn, 0, b"three")
        assert (raised.value.extra["appended"], raised.value.extra["next_seq"]) == (0, None)
        assert await scene.texts() == [b"one", b"two", b"three"]

    check(scene, tmp_path)


def test_p3_an_ending_whose_outcome_is_not_known_is_written_and_counted_once(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        turn = await scene.pushes.open(PushOpening("s", RunWishes()))
        scene.journal.losses["append"] = 1
        await scene.pushes.end("s", turn.run, turn.writer, ending(Reason.INPUT_REQUIRED))
        await scene.pushes.end("s", turn.run, turn.writer, ending(Reason.INPUT_REQUIRED))
        assert scene.endings == [(turn.run, "input_required")]

    check(scene, tmp_path)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "END_RETRY_S", 0.01)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("asked_again", [False, True])
def test_a_cancel_whose_answer_was_lost_is_counted_once(tmp_path: Path, asked_again: bool) -> None:
    async def scene(scene: Scene) -> None:
        turn = await scene.pushes.open(PushOpening("s", RunWishes()))
        scene.journal.losses["end_run"] = 1
        with pytest.raises(JournalUnavailable):
            await scene.pushes.cancel("s", turn.run, "")
        if asked_again:
            assert (await scene.pushes.cancel("s", turn.run, "")).reason == "client_cancel"
        await scene.ended.wait()
        another = await scene.pushes.open(PushOpening("s", RunWishes()))
        await scene.pushes.cancel("s", another.run, "")
        assert scene.endings == [(turn.run, "client_cancel"), (another.run, "client_cancel")]

    check(scene, tmp_path)


@pytest.mark.usefixtures("quick_retries")
def test_p3_a_run_whose_opening_had_no_answer_ends(tmp_path: Path) -> None:
    """Nobody else can: its producer does not know it, and its owner lives."""

    async def scene(scene: Scene) -> None:
        scene.journal.losses["open_run"] = 2
        with pytest.raises(JournalUnavailable):
            await scene.whole("", b"")
        await scene.ended.wait()
        (run,) = await scene.journal.runs("s", "", 10)
        assert scene.endings == [(run.run, "journal_lost")]
        assert not (await scene.journal.describe("s")).open_runs

    check(scene, tmp_path)


def test_an_opening_under_which_a_connection_broke_is_asked_once_more(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        scene.journal.losses["open_run"] = 1
        turn = await scene.pushes.open(PushOpening("s", RunWishes()))
        assert list((await scene.journal.describe("s")).open_runs) == [turn.run]

    check(scene, tmp_path)


@pytest.mark.usefixtures("quick_retries")
def test_p3_a_whole_run_that_the_journal_did_not_take_ends_when_it_is_back(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        scene.journal.losses["append"] = 10**6
        with pytest.raises(JournalUnavailable):
            await scene.whole("", b'{"data":"one"}\n', b"")
        await scene.ended.wait()
        info = await scene.journal.run("s", scene.endings[0][0])
        assert info.status != "open"

    check(scene, tmp_path, journal_deadline_s=1e-300)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_frames_that_the_journal_lost_are_asked_of_their_producer(
    tmp_path: Path, redis_server: RedisServer, kind: str
) -> None:
    """In the midst of a long body too: numbered frames leave a gap, others are told that some are lost."""

    async def scene() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            settings = Settings()
            owned = OwnedRuns(settings, lambda *ended: None)
            pushes = Pushes(journal, settings, owned, lambda *ended: None)
            turn = await pushes.open(PushOpening("s", RunWishes()))
            await pushes.push("s", turn.run, turn.writer, 1, [Event("", b"one")], nothing, None)
            for seq, lost in ((2, SequenceGap), (0, Rewound)):
                await journal.remember()
                pieces = [b'{"data":"two"}\n', b'{"data":"three"}\n']

                async def rewound(pieces: list[bytes] = pieces) -> Piece:
                    if len(pieces) == 1:
                        await journal.rewind()
                    return Piece(pieces.pop(0), False)

                with pytest.raises(lost) as raised:
                    await pushes.push("s", turn.run, turn.writer, seq, Lines(100), rewound, None)
                assert raised.value.extra["appended"] == 1
                assert raised.value.extra.get("expected", 2) == 2
            await pushes.push(
                "s", turn.run, turn.writer, 2, [Event("", b"two"), Event("", b"three")], nothing, COMPLETED
            )
            frames = [frame.data for frame in await journal.frames("s") if not frame.is_control]
            assert frames == [b"one", b"two", b"three"]

    asyncio.run(scene())


def test_p3_a_whole_run_ends_at_its_greatest_age(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        with pytest.raises(RunEnded) as raised:
            await scene.whole("", b'{"data":"one"}\n')
        assert raised.value.extra["reason"] == "max_run"
        assert scene.endings == [(raised.value.extra["run"], "max_run")]
        assert await scene.texts() == [b"one"]

    check(scene, tmp_path, max_run_s=0.05)


def test_a_retried_whole_run_is_not_owned_and_stays_open_when_it_breaks_off(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        with pytest.raises(ClientGone):
            await scene.whole("mine", b'{"data":"one"}\n', ClientGone())
        info = await scene.journal.run("s", "mine")
        assert (info.status, info.owner) == ("open", "")
        with pytest.raises(ClientGone):
            await scene.whole("", b'{"data":"one"}\n', ClientGone())
        assert [reason for _, reason in scene.endings] == ["upstream_truncated"]

    check(scene, tmp_path)


def test_superseding_counts_the_runs_it_ended_and_no_others(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        for run in ("a", "b", "c"):
            turn = await scene.pushes.open(PushOpening("s", RunWishes(run=run)))
            if run == "b":
                await scene.push(turn, 1, b"x", end=COMPLETED)
        scene.endings.clear()
        wishes = RunWishes(run="d", supersedes=("a", "b"))
        turn = await scene.pushes.open(PushOpening("s", wishes))
        assert scene.endings == [("a", "superseded")]
        assert turn.opened is not None
        assert turn.opened.frames_after == 1  # the opening of c
        await scene.pushes.open(PushOpening("s", RunWishes(if_busy="supersede")))
        assert {run for run, _ in scene.endings} == {"a", "c", "d"}

    check(scene, tmp_path)


def test_a_comment_keeps_a_run_alive_and_is_no_frame(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        turn = await scene.pushes.open(PushOpening("s", RunWishes()))
        before = (await scene.journal.run("s", turn.run)).heard_ms
        done = await scene.pushes.push(
            "s", turn.run, turn.writer, 0, Lines(100), bringing(b"\n", b"\n", b""), None
        )
        assert (done.appended, done.first, done.next_seq) == (0, None, 1)
        assert (await scene.journal.run("s", turn.run)).heard_ms >= before

    check(scene, tmp_path)


def test_who_shuts_down_opens_no_run(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        await scene.pushes.drain()
        with pytest.raises(Busy):
            await scene.pushes.open(PushOpening("s", RunWishes()))
        with pytest.raises(Busy):
            await scene.whole("", b"")

    check(scene, tmp_path)
