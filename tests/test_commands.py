"""relay.commands: what the commands ask of a running relay, through cuts and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import pytest
from producing import Producer, ask
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from relay import client, commands
from relay.commands import PushOptions, Refused, cancel_run, list_streams, push_run, show, tail_stream
from relay.errors import InvalidName
from relay.progress import Progress

DEADLINE_S = 40


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_S", 0.05)
    monkeypatch.setattr(client, "RETRY_MAX_S", 0.05)


def follow(
    url: str,
    stream: str,
    *,
    after: str = "start",
    run: str | None = None,
    wait_s: float = 0,
    as_json: bool = False,
) -> list[str]:
    lines: list[str] = []
    asyncio.run(
        asyncio.wait_for(tail_stream(url, stream, after, run, wait_s, as_json, lines.append), DEADLINE_S)
    )
    return lines


def data(lines: list[str]) -> list[str]:
    return [line.split("\t")[2] for line in lines if line.split("\t")[1] != "relay"]


def answer(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, *words: str, named: bool = True
) -> str:
    """A whole answer; its stream."""
    upstream.on_stream(f"/{name}", [f"data: {word}\n\n".encode() for word in words])
    with Reading(f"{relay.url}/{name}", **({"Relay_Stream": name} if named else {})) as reading:
        reading.read()
        return reading.headers["relay-stream"]


def test_tail_prints_a_line_a_frame_and_ends_with_the_stream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    stream = answer(relay, upstream, name, "one", "two", named=False)
    lines = follow(relay.url + "/", stream)
    assert data(lines) == ["one", "two"]
    assert [line.split("\t")[0].partition("-")[0] for line in lines] == ["0", "1", "2", "3", "4", "4"]
    last = lines[2].split("\t")[0]
    assert data(follow(relay.url, stream, after=last)) == ["two"]
    objects = [json.loads(line) for line in follow(relay.url, stream, run="latest", as_json=True)]
    assert [each["data"] for each in objects if each["event"] == ""] == ["one", "two"]
    assert follow(relay.url, stream, after=lines[-1].split("\t")[0]) == []


def test_p2_tail_resumes_across_cuts(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    noise = random.Random(1)  # which does not compress
    words = [noise.randbytes(40).hex() for _ in range(100)]
    stream = answer(relay, upstream, name, *words, named=False)
    with TcpProxy.running(relay.port, lambda number: 1500 + 700 * number) as cutting:
        assert data(follow(cutting.url, stream)) == words
        assert cutting.connections > 2


class Done(Exception):
    """What a test wanted to see was printed."""


class Following:
    """`relay tail` in a thread, until it prints the word `last`."""

    def __init__(self, url: str, stream: str, last: str, *, wait_s: float = 0) -> None:
        self.lines: list[str] = []
        self.began = threading.Event()
        self._last = last
        self._work = (url, stream, "start", None, wait_s, False, self._echo)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with contextlib.suppress(Done):
            asyncio.run(tail_stream(*self._work))

    def _echo(self, line: str) -> None:
        self.lines.append(line)
        self.began.set()
        if line.endswith("\t" + self._last):
            raise Done

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), self.lines


def test_p2_tail_resumes_across_a_restart_of_relay(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str, port: int
) -> None:
    journal = fresh_journal()
    with RelayProcess.start(journal=journal, upstream=upstream.url, port=port) as relay:
        answer(relay, upstream, name, "one")
        following = Following(relay.url, name, "two")
        assert following.began.wait(DEADLINE_S)
    with RelayProcess.start(journal=journal, upstream=upstream.url, port=relay.port) as relay:
        answer(relay, upstream, name, "two")
        following.join()
    assert data(following.lines) == ["one", "two"]
    assert [line for line in following.lines if '"gap"' in line or '"reset"' in line] == []


def test_tail_says_why_it_cannot_follow(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    with pytest.raises(Refused, match="Unknown stream"):
        follow(relay.url, name)
    with pytest.raises(Refused, match="was not created in time"):
        follow(relay.url, name, wait_s=0.01)
    with pytest.raises(InvalidName, match="A stream name is"):
        follow(relay.url, "a b")
    with pytest.raises(Refused, match="Malformed cursor"):
        follow(relay.url, name, after="x")
    with pytest.raises(Refused, match=r"404 and not one of relay's"):
        follow(upstream.url, name)
    with pytest.raises(Refused, match=r"Nothing answers at http://127\.0\.0\.1:1\."):
        follow("http://127.0.0.1:1", name)
    with pytest.raises(Refused, match="'nonsense' is not a URL"):
        follow("nonsense", name)


def test_tail_waits_for_a_stream(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    following = Following(relay.url, name, "one", wait_s=60)
    relay.await_waiting_client()
    answer(relay, upstream, name, "one")
    following.join()
    assert data(following.lines) == ["one"]


def test_ls_lists_every_stream_with_its_state(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.end()

    upstream.on(f"/{name}-open", handler)
    sealed = answer(relay, upstream, name, "one", named=False)
    answer(relay, upstream, name, "one")
    with Reading(f"{relay.url}/{name}-open", Relay_Stream=f"{name}-open") as running:
        running.take(1)
        lines: list[str] = []
        asyncio.run(list_streams(relay.url, lines.append))
        states = {line.split("\t")[0]: line.split("\t")[1:4] for line in lines}
        assert states[name][1:] == ["1 runs", "idle"]
        assert states[name][0].startswith("3-")
        assert states[sealed][2] == "sealed"
        assert states[f"{name}-open"][2] == f"running {running.headers['relay-run']}"
        gate.open()
        running.read()
    assert [line.split("\t")[0] for line in lines] == sorted(line.split("\t")[0] for line in lines)
    with pytest.raises(Refused, match=r"Nothing answers at http://127\.0\.0\.1:1\."):
        asyncio.run(list_streams("http://127.0.0.1:1", lines.append))


def test_ls_pages_through_more_streams_than_one_answer_holds(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    names = [f"{name}-{n:03d}" for n in range(105)]
    for each in names:
        answer(relay, upstream, each, "one")
    lines: list[str] = []
    asyncio.run(list_streams(relay.url, lines.append))
    assert [line.split("\t")[0] for line in lines if line.startswith(name)] == names


class Pushing:
    """`relay push` in a thread, whose input the test writes."""

    def __init__(
        self, url: str, stream: str, form: str = "lines", *, event: str = "", **opening: Any
    ) -> None:
        self.run = ""
        self.stream = stream
        self.error: BaseException | None = None
        self._output, self._input = os.pipe()
        self._opened = threading.Event()
        options = PushOptions(form, event, opening)
        self._work = (url, stream, partial(os.read, self._output), options, self._echo)
        self._thread = threading.Thread(target=self._push, daemon=True)
        self._thread.start()

    def _push(self) -> None:
        try:
            asyncio.run(push_run(*self._work))
        except Refused as error:
            self.error = error
        finally:
            self._opened.set()

    def _echo(self, run: str) -> None:
        self.run = run
        self._opened.set()

    def opened(self) -> str:
        """The run's name, when it is open."""
        assert self._opened.wait(DEADLINE_S)
        assert self.run, self.error
        return self.run

    def write(self, data: bytes) -> Self:
        os.write(self._input, data)
        return self

    def end(self) -> None:
        """No more input; nothing must go wrong."""
        os.close(self._input)
        self._joined()
        os.close(self._output)
        assert self.error is None, self.error

    def refused(self) -> str:
        """Why it ended by itself, though more input could come."""
        self._joined()
        for end in (self._input, self._output):
            with contextlib.suppress(OSError):
                os.close(end)
        assert self.error is not None
        return str(self.error)

    def _joined(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


def push_all(relay: RelayProcess, stream: str, data: bytes, form: str = "lines", **opening: Any) -> str:
    """Push everything; the run's name."""
    pushing = Pushing(relay.url, stream, form, **opening)
    pushing.write(data).end()
    return pushing.run


def frames(relay: RelayProcess, stream: str) -> list[tuple[str, str]]:
    return [(block.event, block.data) for block in whole_run(relay, stream).frames]


def test_push_makes_a_frame_of_every_line_and_completes_the_run(relay: RelayProcess, name: str) -> None:
    run = push_all(relay, name, b"one\r\n\n  two \n\xff three")
    record = whole_run(relay, name)
    assert record.texts == ["one", "", "  two ", "\ufffd three"]
    assert record.outcome == ("completed", "producer_end")
    assert record.ended["run"] == run
    assert frames(relay, name)[0] == ("", "one")


def test_a_line_is_there_as_soon_as_it_was_written(relay: RelayProcess, name: str) -> None:
    pushing = Pushing(relay.url, name, event="say")
    pushing.write(b"one\ntw")
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run=latest&wait=60&control=none") as reading:
        assert [(block.event, block.data) for block in reading.take(1)] == [("say", "one")]
        pushing.write(b"o\n")
        assert reading.take(1)[0].data == "two"
        pushing.end()


def test_p9_text_is_pushed_as_it_comes_and_whole(relay: RelayProcess, name: str) -> None:
    """White space alone is text too, and a character that comes in two pieces is one."""
    pushing = Pushing(relay.url, name, "text")
    seen = []
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?wait=60&control=none&envelope=json") as reading:
        for piece in (b"a", b" ", b"\n\n", b"\xe2\x82", b"\xac!"):
            pushing.write(piece)
            if piece != b"\xe2\x82":
                seen.append(json.loads(reading.take(1)[0].data)["data"])
    pushing.end()
    assert seen == ["a", " ", "\n\n", "\u20ac!"]


def test_text_that_ends_within_a_character_says_so(relay: RelayProcess, name: str) -> None:
    push_all(relay, name, b"a\xe2\x82", "text")
    assert "".join(text for _, text in frames(relay, name)) == "a\ufffd"


def test_p9_objects_are_pushed_with_their_own_event_names(relay: RelayProcess, name: str) -> None:
    push_all(relay, name, b'{"event": "a", "data": "1"}\n\n \n{"data": "2"}', "ndjson")
    assert frames(relay, name) == [("a", "1"), ("", "2")]


def test_many_lines_arrive_in_order(relay: RelayProcess, name: str) -> None:
    lines = [f"line-{n}" for n in range(5000)]
    pushing = Pushing(relay.url, name)
    for begin in range(0, len(lines), 500):
        pushing.write("".join(line + "\n" for line in lines[begin : begin + 500]).encode())
    pushing.end()
    assert whole_run(relay, name).texts == lines


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("ndjson", b"not json\n", "Not a JSON object: 'not json'"),
        ("ndjson", b"[1]\n", "Not a JSON object"),
        ("ndjson", b'{"no": 1}\n', "Invalid event"),
        ("ndjson", b'{"event": "relay", "data": "x"}\n', "Invalid event"),
    ],
)
def test_p3_a_run_whose_input_is_wrong_fails_and_says_why(
    relay: RelayProcess, name: str, form: str, text: bytes, said: str
) -> None:
    pushing = Pushing(relay.url, name, form).write(b'{"data": "kept"}\n' + text)
    assert said in pushing.refused()
    record = whole_run(relay, name)
    assert record.outcome == ("failed", "producer_failed")
    assert said in record.ended["error"]


def test_p3_a_line_without_an_end_is_refused_in_bounded_memory(
    relay: RelayProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "LINE_MAX_BYTES", 1000)
    pushing = Pushing(relay.url, name).write(b"x" * 1001)
    assert "A line is longer than 1000 bytes." in pushing.refused()
    assert whole_run(relay, name).outcome == ("failed", "producer_failed")


def test_p3_input_that_cannot_be_read_fails_the_run(relay: RelayProcess, name: str) -> None:
    def read(size: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(Refused, match=r"The input cannot be read: Input/output error\."):
        asyncio.run(push_run(relay.url, name, read, PushOptions("lines", "", {}), str))
    assert whole_run(relay, name).outcome == ("failed", "producer_failed")


def test_p7_a_push_that_is_cancelled_elsewhere_ends_and_says_so(relay: RelayProcess, name: str) -> None:
    """Though its input is silent."""
    pushing = Pushing(relay.url, name).write(b"one\n")
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?wait=60&control=none") as reading:
        reading.take(1)
    said: list[str] = []
    asyncio.run(cancel_run(relay.url, name, None, said.append))
    assert said == [f"{pushing.run}\tcancelled\tclient_cancel"]
    assert pushing.refused() == f"The run {pushing.run!r} has ended: cancelled, client_cancel."
    assert whole_run(relay, name).texts == ["one"]


def test_p4_a_push_whose_run_was_taken_over_leaves_it_alone(relay: RelayProcess, name: str) -> None:
    pushing = Pushing(relay.url, name)
    run = pushing.opened()
    taken = ask(relay.port, "POST", f"{name}/runs/{run}/writer").json
    pushing.write(b"one\n")
    assert "Writer token is no longer valid" in pushing.refused()
    ask(relay.port, "POST", f"{name}/runs/{run}/end", {"status": "completed"}, Relay_Writer=taken["writer"])
    assert whole_run(relay, name).outcome == ("completed", "producer_end")


def test_p8_a_push_whose_stream_was_deleted_ends(
    relay: RelayProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, wherever the heartbeat that waits has got to: it is longer than the test has patience."""
    monkeypatch.setattr(client, "HEARTBEAT_S", 60)
    for number in range(5):
        pushing = Pushing(relay.url, f"{name}-{number}")
        pushing.opened()
        ask(relay.port, "DELETE", pushing.stream)
        said = pushing.refused()
        assert "Unknown" in said or "stream_deleted" in said


def test_p5_a_push_goes_on_when_relay_was_restarted(
    fresh_journal: Callable[[], str], name: str, port: int
) -> None:
    journal = fresh_journal()
    with RelayProcess.start(journal=journal, port=port) as relay:
        pushing = Pushing(relay.url, name).write(b"one\n")
        with Reading(f"{relay.url}/relay/v1/streams/{name}/events?wait=60&control=none") as reading:
            reading.take(1)
    pushing.write(b"two\n")
    with RelayProcess.start(journal=journal, port=relay.port) as relay:
        pushing.write(b"three\n").end()
        record = whole_run(relay, name)
    assert record.texts == ["one", "two", "three"]
    assert record.outcome == ("completed", "producer_end")


def test_p5_a_push_through_connections_that_break_is_journaled_once(relay: RelayProcess, name: str) -> None:
    """Also when only the answer is lost: each connection breaks a little later."""
    lines = [f"line-{n}" for n in range(40)]

    def breaks_after(number: int) -> int | None:
        # The run is opened over the first one: nothing answers to whom is not even let in.
        return None if number == 0 else 7 * number if number < 60 else None

    with TcpProxy.running(relay.port, breaks_after) as breaking:
        pushing = Pushing(breaking.url, name)
        pushing.opened()
        breaking.cut_all()
        for line in lines:
            pushing.write(line.encode() + b"\n")
        pushing.end()
        assert breaking.connections > 10
    record = whole_run(relay, name)
    assert record.texts == lines
    assert record.outcome == ("completed", "producer_end")


def test_p5_a_named_run_is_pushed_again_from_the_beginning_and_journaled_once(
    relay: RelayProcess, name: str
) -> None:
    first = Producer(relay, name, run="mine")
    first.push("one", "two", Relay_Seq="1")
    assert push_all(relay, name, b"one\ntwo\nthree\n", run="mine") == "mine"
    assert whole_run(relay, name).texts == ["one", "two", "three"]
    assert first.push("late").problem == (409, "fenced")
    assert push_all(relay, name, b"one\ntwo\nthree\n", run="mine") == "mine"
    assert whole_run(relay, name).texts == ["one", "two", "three"]


def test_text_is_not_pushed_twice_under_one_name(relay: RelayProcess, name: str) -> None:
    Producer(relay, name, run="mine").push("one")
    pushing = Pushing(relay.url, name, "text", run="mine")
    assert "cannot be pushed again" in pushing.refused()
    assert whole_run(relay, name).outcome == ("failed", "producer_failed")
    assert "has ended: failed, producer_failed" in Pushing(relay.url, name, run="mine").refused()


def test_push_supersedes_and_carries_metadata(relay: RelayProcess, name: str) -> None:
    first = push_all(relay, name, b"one\n")
    second = push_all(relay, name, b"two\n", supersedes="latest", metadata={"a": 1})
    runs = relay.json(f"/relay/v1/streams/{name}/runs")["runs"]
    assert [(run["run"], run["superseded_by"], run["metadata"]) for run in runs] == [
        (first, second, None),
        (second, None, {"a": 1}),
    ]


def test_push_says_why_it_cannot_begin(relay: RelayProcess, name: str) -> None:
    opened = Producer(relay, name)
    assert "Stream has an open run" in Pushing(relay.url, name, if_busy="reject").refused()
    assert "Unknown run" in Pushing(relay.url, name, supersedes="nobody").refused()
    assert "Invalid parameter" in Pushing(relay.url, name, dialect="klingon").refused()
    assert "Nothing answers at" in Pushing("http://127.0.0.1:1", name).refused()
    assert "is not a URL" in Pushing("nonsense", name).refused()
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == [opened.run]
    with pytest.raises(InvalidName):
        asyncio.run(push_run(relay.url, "a b", lambda size: b"", PushOptions("lines", "", {}), str))


def cancel(relay: RelayProcess, stream: str, run: str | None = None) -> str:
    said: list[str] = []
    asyncio.run(cancel_run(relay.url, stream, run, said.append))
    (line,) = said
    return line


def test_cancel_ends_one_run_or_the_current_one_and_says_how_it_ended(relay: RelayProcess, name: str) -> None:
    first, second, third = (Producer(relay, name).run for _ in range(3))
    assert cancel(relay, name, first) == f"{first}\tcancelled\tclient_cancel"
    assert cancel(relay, name, first) == f"{first}\tcancelled\tclient_cancel"
    assert cancel(relay, name) == f"{third}\tcancelled\tclient_cancel"
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == [second]
    assert cancel(relay, name) == f"{second}\tcancelled\tclient_cancel"
    assert cancel(relay, name) == "no run is open"
    done = push_all(relay, name, b"one\n")
    assert cancel(relay, name, done) == f"{done}\tcompleted\tproducer_end"


def test_cancel_says_why_it_cannot(relay: RelayProcess, name: str) -> None:
    with pytest.raises(Refused, match="Unknown stream"):
        cancel(relay, name)
    Producer(relay, name)
    with pytest.raises(Refused, match="Unknown run"):
        cancel(relay, name, "nobody")
    with pytest.raises(Refused, match="Nothing answers"):
        asyncio.run(cancel_run("http://127.0.0.1:1", name, None, str))


def inspected(relay: RelayProcess, stream: str, run: str | None = None, *, transcript: bool = False) -> Any:
    said: list[str] = []
    asyncio.run(show(relay.url, stream, run, transcript, said.append))
    (text,) = said
    return json.loads(text)


def test_inspect_shows_a_stream_with_its_runs_or_one_run_or_its_text(relay: RelayProcess, name: str) -> None:
    run = push_all(relay, name, b"one\ntwo\n")
    stream = inspected(relay, name)
    assert stream["stream"] == name
    assert [each["run"] for each in stream["runs"]] == [run]
    assert inspected(relay, name, run) == stream["runs"][0]
    assert inspected(relay, name, run, transcript=True)["text"] == "onetwo"
    with pytest.raises(Refused, match="Unknown stream"):
        inspected(relay, name + "-no")
    with pytest.raises(Refused, match="Unknown run"):
        inspected(relay, name, "nobody", transcript=True)


def test_inspect_pages_through_more_runs_than_one_answer_holds(relay: RelayProcess, name: str) -> None:
    runs = [f"r{n}" for n in range(103)]
    for run in runs:
        ask(relay.port, "POST", f"{name}/runs", {"run": run, "if_busy": "supersede"})
    assert [each["run"] for each in inspected(relay, name)["runs"]] == runs


class Terminal(io.StringIO):
    """Where somebody waits."""

    def isatty(self) -> bool:
        return True


def test_a_push_says_how_far_it_is_and_then_no_more(relay: RelayProcess, name: str) -> None:
    terminal, given = Terminal(), iter([b"one\ntwo\n", b"three\n", b""])
    progress = Progress(terminal, iter(range(1000)).__next__)
    asyncio.run(
        push_run(
            relay.url, name, lambda size: next(given), PushOptions("lines", "", {}), lambda run: None,
            progress=progress,
        )
    )  # fmt: skip
    shown = [text for text in terminal.getvalue().split("\r\x1b[K") if text]
    assert shown == ["1 frames, 3 B", "2 frames, 6 B", "3 frames, 11 B"]
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_replay_says_how_much_of_it_is_left_and_a_live_stream_nothing(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    stream = answer(relay, upstream, name, "one", "two", named=False)
    terminal, lines = Terminal(), list[str]()
    progress = Progress(terminal, iter(range(1000)).__next__)
    asyncio.run(tail_stream(relay.url, stream, "start", None, 0, False, lines.append, progress=progress))
    shown = [text for text in terminal.getvalue().split("\r\x1b[K") if text]
    # Behind at its start, at run.started, one and two; not at run.ended.
    assert shown == [f"{behind} frames behind" for behind in (4, 3, 2, 1)]
    assert data(lines) == ["one", "two"]
    assert terminal.getvalue().endswith("\r\x1b[K")
