"""The events route as a client meets it: every input and every answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from answering import Agent, answer, problem
from producing import ask
from reading import Block, Reading
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

DEADLINE_S = 60

CUT = (OSError, http.client.HTTPException)
"""What a reader meets whose connection was cut."""


def until(blocks: Iterator[Block], kind: str) -> list[Block]:
    """Blocks up to the control frame of a type, which is the last of them."""
    seen = []
    for block in blocks:
        seen.append(block)
        if block.control is not None and block.control["type"] == kind:
            return seen
    raise AssertionError(f"no {kind} in {seen}")


def shape(blocks: list[Block]) -> list[str]:
    """Frames by their data, control frames by their type."""
    return [block.data if block.control is None else f"<{block.control['type']}>" for block in blocks]


def words(blocks: list[Block]) -> list[str]:
    return [block.data for block in blocks if block.event != "relay"]


def until_metric(relay: RelayProcess, line_start: str, is_right: Callable[[float], bool]) -> None:
    """Wait for what relay tells of itself."""
    relay.until(lambda: is_right(relay.metric(line_start)), line_start)


def page(relay: RelayProcess, stream: str, query: str = "", **headers: str) -> Any:
    status, got, body = relay.get(
        f"/relay/v1/streams/{stream}/events{query}", Accept="application/json", **headers
    )
    assert (status, got["content-type"]) == (200, "application/json")
    return json.loads(body)


# --- what a reader is shown, and in which order ------------------------------------------------------


def test_a_reader_gets_hello_then_the_journal_then_live_then_what_comes(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(relay, upstream, name)
    agent.say("one", "two")
    with Reading(agent.events) as reading:
        replay = until(reading.blocks(), "live")
        agent.say("three")
        agent.end()
        live = until(reading.blocks(), "run.ended")
    assert shape(replay) == ["<hello>", "<run.started>", "one", "two", "<live>"]
    assert shape(live) == ["three", "<run.ended>"]
    ids = [block.id for block in replay + live]
    seqs = [int(id_.partition("-")[0]) for id_ in ids]
    assert seqs == [0, 1, 2, 3, 3, 4, 5]
    hello, at_live = replay[0].control, replay[-1].control
    assert hello == {
        "type": "hello",
        "stream": name,
        "cursor": "0-0",
        "earliest": ids[1],
        "top": ids[3],
        "resumed": False,
    }
    assert at_live == {"type": "live", "cursor": ids[3]}
    assert replay[-1].id == ids[3]
    ended = live[-1].control
    assert ended is not None
    assert (ended["run"], ended["status"], ended["reason"], ended["frames"]) == (
        *(agent.run, "completed", "upstream_end"),
        3,
    )


def test_a_streaming_answer_carries_the_headers_that_keep_it_from_being_stored_or_held_back(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = answer(relay, upstream, name, "one")
    for accept, media_type in (
        ("text/event-stream", "text/event-stream; charset=utf-8"),
        ("*/*", "text/event-stream; charset=utf-8"),
        ("application/x-ndjson", "application/x-ndjson"),
    ):
        with Reading(agent.events, Accept=accept) as reading:
            assert reading.status == 200
            assert reading.headers["content-type"] == media_type
            assert reading.headers["cache-control"] == "no-cache, no-store, no-transform"
            assert reading.headers["x-accel-buffering"] == "no"
            assert reading.headers["vary"] == "Last-Event-ID, Accept-Encoding"


def test_a_stream_that_ended_says_bye_and_closes(relay: RelayProcess, upstream: ScriptedUpstream) -> None:
    agent = answer(relay, upstream, "", "one")
    with Reading(agent.events) as reading:
        blocks = list(reading.blocks())
    assert shape(blocks) == ["<hello>", "<run.started>", "one", "<run.ended>", "<bye>"]
    bye = blocks[-1].control
    assert bye is not None
    assert bye["reason"] == "ended"
    assert bye["retry_ms"] > 0
    assert blocks[-1].id == blocks[-2].id


# --- where a reader begins ----------------------------------------------------------------------------


def test_after_says_where_a_first_connection_begins(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(relay, upstream, name)
    agent.say("one", "two")
    with Reading(agent.events) as reading:
        ids = [block.id for block in until(reading.blocks(), "live")]

    def first(query: str, **headers: str) -> list[str]:
        with Reading(agent.events + query, **headers) as reading:
            return shape(until(reading.blocks(), "live"))

    whole = ["<hello>", "<run.started>", "one", "two", "<live>"]
    assert first("?after=start") == first("?after=") == first("?after=0-0") == whole
    assert first(f"?after={ids[2]}") == ["<hello>", "two", "<live>"]
    assert first("?after=tail") == ["<hello>", "<live>"]
    assert first("?after=tail", Last_Event_ID=ids[2]) == ["<hello>", "two", "<live>"]
    assert first(f"?after={ids[2]}", Last_Event_ID=ids[1]) == ["<hello>", "one", "two", "<live>"]
    agent.end()


def test_hello_says_whether_a_cursor_was_honoured(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = answer(relay, upstream, name, "one")
    with Reading(agent.events) as reading:
        frames = until(reading.blocks(), "live")
    with Reading(agent.events, Last_Event_ID=frames[1].id) as reading:
        (first,) = reading.take(1)
    assert first.id == frames[1].id
    assert first.control is not None
    assert first.control["resumed"] is True
    assert first.control["cursor"] == frames[1].id
    assert first.control["earliest"] == frames[1].id


def test_a_proxied_resume_id_is_a_cursor_of_its_stream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    before = answer(relay, upstream, name, "before")
    agent = answer(relay, upstream, name, "one", "two")
    with Reading(agent.events, Last_Event_ID=agent.resume_ids[0]) as reading:
        assert shape(until(reading.blocks(), "live")) == ["<hello>", "two", "<run.ended>", "<live>"]
    start = agent.resume_ids[0].rpartition(".")[0] + ".0-0"
    with Reading(f"{agent.events}?after={start}") as reading:
        assert words(until(reading.blocks(), "live")) == ["one", "two"]
    other = answer(relay, upstream, "", "else")
    for id_ in (other.resume_ids[0], "rly." + "x" * 32 + ".1-1", "rly.nonsense"):
        refused = relay.get(f"/relay/v1/streams/{name}/events", Last_Event_ID=id_)
        assert problem(refused)["code"] == "resume_unknown"
        assert refused[0] == 410
    assert before.stream == agent.stream


# --- one run ------------------------------------------------------------------------------------------


def test_run_limits_the_answer_to_one_run_and_ends_behind_its_terminal_frame(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    first = answer(relay, upstream, name, "a1", "a2")
    second = answer(relay, upstream, name, "b1")
    for query, text in ((first.run, ["a1", "a2"]), (second.run, ["b1"]), ("latest", ["b1"])):
        with Reading(f"{first.events}?run={query}") as reading:
            blocks = list(reading.blocks())
        assert words(blocks) == text
        assert shape(blocks)[-2:] == ["<run.ended>", "<bye>"]
        with Reading(f"{first.events}?run={query}", Last_Event_ID=blocks[-1].id) as again:
            assert again.status == 204
    assert relay.get(f"/relay/v1/streams/{name}/events?run=current")[0] == 204
    unknown = relay.get(f"/relay/v1/streams/{name}/events?run=nobody")
    assert (unknown[0], problem(unknown)["code"]) == (404, "unknown_run")


def test_a_page_reloaded_in_mid_answer_gets_this_answer_from_its_start_and_goes_on_live(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answer(relay, upstream, name, "an older answer")
    agent = Agent(relay, upstream, name)
    agent.say("one", "two")
    with Reading(f"{agent.events}?run=current") as reading:
        replay = until(reading.blocks(), "live")
        agent.say("three")
        agent.end()
        live = list(reading.blocks())
    assert shape(replay) == ["<hello>", "<run.started>", "one", "two", "<live>"]
    assert shape(live) == ["three", "<run.ended>", "<bye>"]
    with Reading(f"{agent.events}?run=current") as reading:
        assert reading.status == 204


@pytest.mark.parametrize("word", ["current", "latest"])
@pytest.mark.parametrize("control", ["events", "none"])
def test_p2_a_reader_of_the_current_run_gets_the_rest_of_the_run_it_was_cut_in(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, word: str, control: str
) -> None:
    """The run ended, and another began, while the client was away: neither may cost it text."""
    agent = Agent(relay, upstream, name)
    agent.say("one")
    url = f"{agent.events}?run={word}&control={control}"
    with Reading(url) as reading:
        cut_at = next(block for block in reading.blocks() if block.data == "one").id
    agent.say("two")
    agent.end()
    newer = Agent(relay, upstream, name)
    newer.say("newer")
    with Reading(url, Last_Event_ID=cut_at) as reading:
        assert words(list(reading.blocks())) == ["two"]
        seen_to = reading.last_id
    with Reading(url, Last_Event_ID=seen_to) as reading:
        assert reading.take(1 if control == "none" else 3)[-1].data == "newer"
    newer.end()


def test_a_reader_cut_right_after_hello_comes_back_to_the_run_it_was_promised(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(relay, upstream, name)
    with Reading(f"{agent.events}?run=current") as reading:
        (hello,) = reading.take(1)
    agent.say("one")
    agent.end()
    with Reading(f"{agent.events}?run=current", Last_Event_ID=hello.id) as reading:
        assert words(list(reading.blocks())) == ["one"]


# --- waiting for a stream -----------------------------------------------------------------------------


def test_a_stream_that_is_waited_for_is_read_as_soon_as_it_is_there(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    got: list[str] = []
    url = f"{relay.url}/relay/v1/streams/{name}/events?wait=60"

    def read() -> None:
        with Reading(url) as reading:
            got.extend(shape(until(reading.blocks(), "run.ended")))

    thread = threading.Thread(target=read)
    thread.start()
    relay.await_waiting_client()
    answer(relay, upstream, name, "one")
    thread.join(DEADLINE_S)
    assert [item for item in got if item != "<live>"] == ["<hello>", "<run.started>", "one", "<run.ended>"]


def test_a_stream_that_is_not_created_in_time_is_said_in_band(relay: RelayProcess, name: str) -> None:
    url = f"{relay.url}/relay/v1/streams/{name}/events?wait=0.05"
    with Reading(url) as reading:
        assert reading.status == 200
        text = reading.read().decode()
    assert re.match(r"retry: \d+\nevent: relay\ndata: \{", text), text
    bye = json.loads(text.partition("data: ")[2])
    assert (bye["type"], bye["reason"]) == ("bye", "not_yet")
    with Reading(url, Accept="application/x-ndjson") as reading:
        (line,) = reading.lines()
        assert json.loads(json.loads(line)["data"])["reason"] == "not_yet"
    with Reading(url + "&control=none") as reading:
        assert re.fullmatch(r"retry: \d+\n\n", reading.read().decode())
    for accept, query in (("application/json", ""), ("application/x-ndjson", "&control=none")):
        refused = relay.get(url.removeprefix(relay.url) + query, Accept=accept)
        assert (refused[0], problem(refused)["code"]) == (404, "unknown_stream")


# --- how frames are shown -----------------------------------------------------------------------------


def test_control_frames_can_be_comments_that_move_the_cursor_without_an_event(
    relay: RelayProcess, upstream: ScriptedUpstream
) -> None:
    agent = answer(relay, upstream, "", "one")
    with Reading(f"{agent.events}?control=comments") as reading:
        blocks = list(reading.blocks())
        assert shape(blocks) == ["one"]
    with Reading(f"{agent.events}?control=comments") as reading:
        text = reading.read().decode()
    notices = re.findall(r'^: relay \{"type":"([a-z.]+)".*\}\nid: (\d+)-\d+\n\n', text, re.M)
    assert notices == [("hello", "0"), ("run.started", "1"), ("run.ended", "3"), ("bye", "3")]
    assert re.search(r"^retry: \d+\n\n", text, re.M)


def test_control_frames_can_be_left_out(relay: RelayProcess, upstream: ScriptedUpstream) -> None:
    agent = answer(relay, upstream, "", "one", "two")
    with Reading(f"{agent.events}?control=none") as reading:
        text = reading.read().decode()
    retry = r"retry: \d+\n\n"
    assert re.fullmatch(retry + r"id: 2-\d+\ndata: one\n\nid: 3-\d+\ndata: two\n\n" + retry, text)


def test_an_envelope_holds_the_whole_frame_under_no_event_name(
    relay: RelayProcess, upstream: ScriptedUpstream
) -> None:
    agent = answer(relay, upstream, "", "one")
    with Reading(f"{agent.events}?envelope=json") as reading:
        blocks = list(reading.blocks())
    assert {block.event for block in blocks} == {""}
    objects = [json.loads(block.data) for block in blocks]
    assert [each["event"] for each in objects] == ["relay", "relay", "", "relay", "relay"]
    assert [each["id"] for each in objects] == [block.id for block in blocks]
    frame = objects[2]
    assert (frame["data"], frame["run"]) == ("one", agent.run)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", frame["at"])
    assert frame.keys() == {"id", "event", "data", "run", "at"}


def test_ndjson_is_followed_live(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    agent = Agent(relay, upstream, name)
    agent.say("one")
    with Reading(f"{agent.events}?run={agent.run}", Accept="application/x-ndjson") as reading:
        lines = (json.loads(line) for line in reading.lines() if line)
        replay = [next(lines) for _ in range(4)]
        agent.say("two")
        live = next(lines)
        agent.end()
        rest = list(lines)
    assert [line["event"] for line in replay] == ["relay", "relay", "", "relay"]
    assert (live["data"], live["run"], live["event"]) == ("two", agent.run, "")
    assert [json.loads(line["data"])["type"] for line in rest] == ["run.ended", "bye"]
    with Reading(agent.events, Accept="application/x-ndjson", Last_Event_ID=live["id"]) as reading:
        assert json.loads(next(reading.lines()))["id"] == live["id"]


def test_json_gives_one_page_and_the_cursor_of_the_next(
    relay: RelayProcess, upstream: ScriptedUpstream
) -> None:
    agent = answer(relay, upstream, "", "one", "two", "three")
    seen, cursor, ended = [], "0-0", False
    while not ended:
        got = page(relay, agent.stream, "?limit=2", Last_Event_ID=cursor)
        assert got.keys() == {"frames", "cursor", "more", "ended"}
        assert len(got["frames"]) <= 2
        assert got["cursor"] == got["frames"][-1]["id"]
        assert got["ended"] is not got["more"]
        seen += got["frames"]
        cursor, ended = got["cursor"], got["ended"]
    assert [frame["data"] for frame in seen if frame["event"] != "relay"] == ["one", "two", "three"]
    assert page(relay, agent.stream, "?after=" + cursor) == {
        "frames": [], "cursor": cursor, "more": False, "ended": True,
    }  # fmt: skip
    assert [frame["data"] for frame in page(relay, agent.stream, "?control=none")["frames"]] == [
        *("one", "two"),
        "three",
    ]


def test_a_json_page_of_one_run_ends_with_the_run(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    first = answer(relay, upstream, name, "a")
    agent = Agent(relay, upstream, name)
    agent.say("b")
    got = page(relay, name, f"?run={first.run}")
    assert [frame["run"] for frame in got["frames"]] == [first.run] * 3
    assert (got["more"], got["ended"]) == (False, True)
    got = page(relay, name, "?run=current")
    assert [frame["run"] for frame in got["frames"]] == [agent.run] * 2
    assert (got["more"], got["ended"]) == (False, False)
    assert page(relay, name, "?after=tail")["frames"] == []
    agent.end()


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("?after=nonsense", {}, 400, "malformed_cursor"),
        ("", {"Last_Event_ID": "12"}, 400, "malformed_cursor"),
        ("?after=1-1", {"Last_Event_ID": "1-1-1"}, 400, "malformed_cursor"),
        ("", {"Last_Event_ID": "9" * 600}, 400, "malformed_cursor"),
        ("", {"Last_Event_ID": "0-5"}, 400, "malformed_cursor"),
        ("?run=a b".replace(" ", "%20"), {}, 400, "invalid_name"),
        ("?wait=61", {}, 400, "invalid_parameter"),
        ("?wait=nan", {}, 400, "invalid_parameter"),
        ("?wait=soon", {}, 400, "invalid_parameter"),
        ("?control=some", {}, 400, "invalid_parameter"),
        ("?envelope=xml", {}, 400, "invalid_parameter"),
        ("?heartbeat=loud", {}, 400, "invalid_parameter"),
        ("?limit=0", {}, 400, "invalid_parameter"),
        ("?limit=1001", {}, 400, "invalid_parameter"),
        ("", {"Accept": "text/html"}, 406, "not_acceptable"),
        ("", {"Accept": "text/event-stream;q=0, image/png"}, 406, "not_acceptable"),
    ],
)
def test_a_wrong_request_is_refused_with_a_problem_that_has_a_code(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    query: str,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    got = relay.get("/relay/v1/streams/whatever/events" + query, **headers)
    assert (got[0], problem(got)["code"]) == (status, code)


@pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE"])
def test_the_read_route_is_for_get_only(relay: RelayProcess, method: str, name: str) -> None:
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events", method=method) as reading:
        assert reading.status == 405
        assert reading.headers["content-type"] == "application/problem+json"
        if method != "HEAD":
            document = json.loads(reading.read())
            assert document["code"] == "method_not_allowed"
            assert document["allow"] == "GET"
        assert reading.headers["allow"] == "GET"


# --- after the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["events", "none", "comments"])
def test_after_the_end_an_event_source_is_told_to_stop(
    relay: RelayProcess, upstream: ScriptedUpstream, control: str
) -> None:
    """204 as soon as nothing is left that this reader would be shown: its cursor is its last event's id."""
    agent = answer(relay, upstream, "", "one", "two")
    url = f"{agent.events}?control={control}"
    with Reading(url) as reading:
        shown = list(reading.blocks())
    for query in ("", f"&run={agent.run}", "&run=latest"):
        with Reading(url + query, Last_Event_ID=shown[-1].id) as reading:
            assert reading.status == 204
            assert reading.read() == b""
        with Reading(url + query, Last_Event_ID=shown[-2].id) as reading:
            assert reading.status == (200 if control != "events" else 204)
    last_word = next(block for block in shown if block.data == "two").id
    with Reading(url, Last_Event_ID=last_word) as reading:
        assert reading.status == (200 if control == "events" else 204)


def test_a_stream_that_may_go_on_is_never_204(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = answer(relay, upstream, name, "one")
    with Reading(agent.events) as reading:
        last = until(reading.blocks(), "live")[-1].id
    with Reading(agent.events, Last_Event_ID=last) as reading:
        assert reading.status == 200
        assert shape(until(reading.blocks(), "live")) == ["<hello>", "<live>"]


# --- loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cursor", "reason"), [("2-{later}", "diverged"), ("99-{later}", "ahead"), ("2-1000", "recreated")]
)
def test_p8_a_cursor_of_another_life_is_told_by_a_reset_before_the_next_frame(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, cursor: str, reason: str
) -> None:
    agent = answer(relay, upstream, name, "one")
    with Reading(agent.events) as reading:
        whole = until(reading.blocks(), "live")
    cursor = cursor.format(later=int(whole[2].id.partition("-")[2]) + 1)
    with Reading(agent.events, Last_Event_ID=cursor) as reading:
        blocks = until(reading.blocks(), "live")
    assert shape(blocks) == ["<hello>", "<reset>", "<run.started>", "one", "<run.ended>", "<live>"]
    hello, reset = blocks[0], blocks[1]
    assert hello.id == cursor
    assert hello.control is not None
    assert hello.control["resumed"] is False
    assert reset.control == {"type": "reset", "reason": reason}
    assert reset.id == "0-0"
    with Reading(agent.events, Last_Event_ID=reset.id) as reading:
        assert shape(until(reading.blocks(), "live")) == shape(whole)
    for headers, query in (({}, "?control=none"), ({"Accept": "application/json"}, "")):
        gone = relay.get(f"/relay/v1/streams/{name}/events{query}", Last_Event_ID=cursor, **headers)
        document = problem(gone)
        assert (gone[0], document["code"], document["reason"]) == (410, "cursor_gone", reason)
        assert document["cursor"] == "0-0"
    with Reading(f"{agent.events}?run={agent.run}", Last_Event_ID=cursor) as reading:
        assert shape(list(reading.blocks())) == [
            *("<hello>", "<reset>", "<run.started>", "one", "<run.ended>", "<bye>")
        ]


def test_p8_a_cursor_of_another_life_is_told_though_the_run_asked_for_began_later(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answer(relay, upstream, name, "one", "two")
    agent = answer(relay, upstream, name, "three")
    with Reading(f"{agent.events}?run={agent.run}", Last_Event_ID="2-1000") as reading:
        blocks = list(reading.blocks())
    assert shape(blocks)[:2] == ["<hello>", "<reset>"]
    assert words(blocks) == ["three"]


@pytest.fixture(scope="session")
def forgetful(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay whose streams keep four frames, and whose heart beats fast."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, max_frames=4, heartbeat_s=0.05
    ) as process:
        yield process


def test_p8_what_was_trimmed_away_is_told_once_and_with_the_true_ids(
    forgetful: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(forgetful, upstream, name)
    agent.say("one")
    with Reading(f"{agent.events}") as reading:
        cursor = next(block for block in reading.blocks() if block.data == "one").id
    agent.say(*(f"word-{n}" for n in range(8)))
    with Reading(agent.events, Last_Event_ID=cursor) as reading:
        blocks = until(reading.blocks(), "live")
    assert shape(blocks) == ["<hello>", "<gap>", "word-4", "word-5", "word-6", "word-7", "<live>"]
    hello, gap, first = blocks[0], blocks[1], blocks[2]
    assert gap.control == {"type": "gap", "requested": cursor, "earliest": first.id}
    assert int(gap.id.partition("-")[0]) == int(first.id.partition("-")[0]) - 1
    assert hello.id == cursor
    assert hello.control is not None
    assert (hello.control["resumed"], hello.control["earliest"]) == (False, first.id)
    with Reading(agent.events, Last_Event_ID=gap.id) as reading:
        again = until(reading.blocks(), "live")
    assert shape(again) == ["<hello>", "word-4", "word-5", "word-6", "word-7", "<live>"]
    with Reading(agent.events, Last_Event_ID=blocks[3].id) as reading:
        (middle,) = reading.take(1)
    assert middle.control is not None
    assert middle.control["earliest"] == first.id
    with Reading(agent.events) as reading:
        assert shape(until(reading.blocks(), "live"))[:2] == ["<hello>", "word-4"]
    for headers, query in (({}, "?control=none"), ({"Accept": "application/json"}, "")):
        gone = forgetful.get(f"/relay/v1/streams/{name}/events{query}", Last_Event_ID=cursor, **headers)
        document = problem(gone)
        assert (gone[0], document["code"], document["reason"]) == (410, "cursor_gone", "gap")
        page_after = page(forgetful, name, "", Last_Event_ID=document["cursor"])
        assert page_after["frames"][0]["data"] == "word-4"
    agent.end()


def test_p8_a_run_that_was_trimmed_from_its_start_is_a_gap_and_still_ends(
    forgetful: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gone = answer(forgetful, upstream, name, "gone")
    cut = answer(forgetful, upstream, name, *(f"word-{n}" for n in range(6)))
    with Reading(f"{cut.events}?run={cut.run}") as reading:
        assert shape(list(reading.blocks())) == [
            *("<hello>", "<gap>", "word-3", "word-4", "word-5", "<run.ended>", "<bye>")
        ]
    with Reading(f"{cut.events}?run={gone.run}") as reading:
        blocks = list(reading.blocks())
    assert shape(blocks) == ["<hello>", "<gap>", "<bye>"]
    with Reading(f"{cut.events}?run={gone.run}", Last_Event_ID=blocks[-1].id) as reading:
        assert reading.status == 204


def test_a_silent_stream_has_heartbeats_and_a_script_can_ask_to_see_them(
    forgetful: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(forgetful, upstream, name)
    with Reading(agent.events) as reading:
        assert next(line for line in reading.lines() if line.startswith(":")) == ": hb"
    with Reading(f"{agent.events}?heartbeat=event") as reading:
        beat = until(reading.blocks(), "heartbeat")[-1]
    assert beat.id.startswith("1-")
    with Reading(agent.events, Accept="application/x-ndjson") as reading:
        assert "" in reading.lines()
    agent.end()


# --- every reader the same ----------------------------------------------------------------------------


def test_p2_two_tabs_one_late_and_one_cut_often_have_identical_text(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    said = [f"word-{n}-{'x' * (n % 50)}" for n in range(300)]
    agent = Agent(relay, upstream, name)
    seen: list[str] = []
    began = threading.Event()
    with TcpProxy.running(relay.port, lambda number: 400 + 97 * number) as cutting:

        def cut_often() -> None:
            last = ""
            while "<run.ended>" not in seen:
                url = f"{cutting.url}/relay/v1/streams/{name}/events?run=current"
                headers = {"Last_Event_ID": last} if last else {}
                with contextlib.suppress(*CUT), Reading(url, **headers) as reading:
                    assert reading.status == 200
                    for block in reading.blocks():
                        last = block.id
                        began.set()
                        if block.control is None or block.control["type"].startswith("run."):
                            seen.extend(shape([block]))

        tab = threading.Thread(target=cut_often, daemon=True)
        tab.start()
        agent.say(*said)
        with Reading(f"{agent.events}?run=current") as late:
            blocks = late.take(150)
            assert began.wait(DEADLINE_S)  # without a cursor it would find no current run any more
            agent.end()
            blocks += until(late.blocks(), "run.ended")
        tab.join(DEADLINE_S)
        assert cutting.connections > 3
    assert words(blocks) == said
    assert seen == ["<run.started>", *said, "<run.ended>"]


def test_p1_what_a_live_reader_sees_is_in_the_journal_already(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(relay, upstream, name)
    with Reading(f"{agent.events}?control=none") as reading:
        for n in range(20):
            agent.send(str(n))
            (block,) = reading.take(1)
            held = page(relay, name)["frames"]
            assert (held[-1]["id"], held[-1]["data"]) == (block.id, str(n))
            agent.receive(1)
    agent.end()


def test_p9_event_names_and_data_arrive_as_the_standard_reads_them_under_ids_of_relay(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    body = (
        "\ufeffid: upstream-1\nretry: 5\n: a comment\nevent: delta\ndata: first\ndata:  second\n\n"
        'data\n\nevent: ünïcode\r\ndata: 🙂\r\n\r\nevent: nothing\n\ndata: {"a": 1}\n\n'
    )
    upstream.on_stream(f"/{name}", [body.encode()])
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as reading:
        reading.read()
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run=latest&control=none") as reading:
        text = reading.read().decode()
    ids = re.findall(r"^id: (\d+-\d+)$", text, re.M)
    assert [id_.partition("-")[0] for id_ in ids] == ["2", "3", "4", "5"]
    frames = text.partition("\n\n")[2].rpartition("retry:")[0]
    assert re.sub(r"id: \d+-\d+\n", "", frames) == (
        'event: delta\ndata: first\ndata:  second\n\ndata: \n\nevent: ünïcode\ndata: 🙂\n\ndata: {"a": 1}\n\n'
    )


# --- sent away, and back ------------------------------------------------------------------------------


def test_a_reader_over_the_limit_is_told_busy_in_band(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, readers_max=1) as relay:
        answer(relay, upstream, name, "one")
        url = f"{relay.url}/relay/v1/streams/{name}/events"
        until_metric(relay, "relay_readers_open", lambda value: value == 0)
        with Reading(url) as reading:
            until(reading.blocks(), "live")
            with Reading(url) as refused:
                assert refused.status == 200
                text = refused.read().decode()
            assert re.match(r"retry: \d+\nevent: relay\ndata: \{", text), text
            assert json.loads(text.partition("data: ")[2])["reason"] == "busy"
            with Reading(url, Last_Event_ID="0-0") as refused:
                (bye,) = refused.blocks()
            assert bye.id == "0-0"
            with Reading(f"{relay.url}/relay/v1/streams/nobody/events?wait=60") as refused:
                (bye,) = refused.blocks()
            assert bye.control is not None
            assert bye.control["reason"] == "busy"
            assert page(relay, name)["frames"]


def test_p2_a_reader_rotated_again_and_again_misses_nothing_and_sees_nothing_twice(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, reader_max_s=0.2, heartbeat_s=0.1
    ) as relay:
        agent = Agent(relay, upstream, name)
        url = f"{relay.url}/relay/v1/streams/{name}/events"
        last, seen = "0-0", list[str]()
        for word in ("word-0", "word-1", "word-2"):
            agent.say(word)
            while word not in seen:  # a slow relay may send its reader away before it has shown anything
                with Reading(url, Last_Event_ID=last) as reading:
                    blocks = list(reading.blocks())
                assert blocks[-1].control is not None
                assert blocks[-1].control["type"] == "bye"
                assert blocks[-1].control["reason"] == "rotate"
                seen += words(blocks)
                last = reading.last_id
        assert seen == ["word-0", "word-1", "word-2"]
        agent.end()


def test_a_relay_that_is_told_to_stop_sends_readers_away_and_exits(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url) as relay:
        answer(relay, upstream, name, "one")
        url = f"{relay.url}/relay/v1/streams/{name}/events"
        with Reading(url) as reading:
            live = until(reading.blocks(), "live")
            with Reading(f"{relay.url}/relay/healthz") as alive:
                assert alive.status == 200
            byes: list[Block] = []

            def wait_for_a_stream() -> None:
                with Reading(f"{relay.url}/relay/v1/streams/nobody/events?wait=60") as waiting:
                    byes.extend(waiting.blocks())

            waiter = threading.Thread(target=wait_for_a_stream)
            waiter.start()
            relay.await_waiting_client()
            relay.process.terminate()
            (bye,) = list(reading.blocks())
            waiter.join(DEADLINE_S)
        assert bye.control is not None
        assert (bye.control["type"], bye.control["reason"]) == ("bye", "drain")
        assert bye.control["retry_ms"] > 0
        assert bye.id == live[-1].id
        assert [block.control and block.control["reason"] for block in byes] == ["drain"]
        assert relay.process.wait(DEADLINE_S) == 0


def test_p6_a_reader_that_takes_nothing_is_cut_and_resumes_with_nothing_lost(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    said = [f"{n:04d}" + "x" * 20_000 for n in range(800)]
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, write_timeout_s=0.2, ring_max_bytes=100_000
    ) as relay:
        upstream.on_stream(f"/{name}", [f"data: {word}\n\n".encode() for word in said])
        url = f"{relay.url}/relay/v1/streams/{name}/events?wait=60"
        # Nobody waits for the answer: who reads it is cut as well if the system lets him wait for so long.
        started = ask(relay.port, "POST", f"{name}/runs", {"upstream": {"path": f"/{name}"}})
        assert started.status == 202
        stalled = Reading(url, Accept_Encoding="identity")
        until_metric(relay, 'relay_readers_ended_total{reason="slow"}', lambda value: value > 0)
        seen: list[Block] = []
        with contextlib.suppress(*CUT):
            seen.extend(stalled.blocks())
        stalled.cut()
        assert len(seen) < len(said)
        assert relay.metric("relay_ring_bytes") < 1_000_000
        while shape(seen[-1:]) != ["<run.ended>"]:
            with (
                contextlib.suppress(*CUT),  # as it may be again
                Reading(url, Last_Event_ID=seen[-1].id) as reading,
            ):
                for block in reading.blocks():
                    seen.append(block)
                    if shape([block]) == ["<run.ended>"]:
                        break
        assert words(seen) == said


def test_p6_readers_that_caught_up_hold_nothing_of_what_they_were_sent(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = answer(relay, upstream, name, *(f"{n:02d}" + "x" * 4000 for n in range(60)))
    with contextlib.ExitStack() as readers:

        def connect(count: int) -> int:
            for _ in range(count):
                until(readers.enter_context(Reading(agent.events)).blocks(), "live")
            return relay.rss_bytes()

        warm = connect(20)
        assert connect(150) - warm < 15_000_000
