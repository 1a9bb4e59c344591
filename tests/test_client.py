"""relay.client: `relay tail` and `relay ls` against a running relay, through cuts and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable

import pytest
from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from relay import client
from relay.client import Refused, list_streams, tail_stream
from relay.errors import InvalidName

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RECONNECT_S", 0.05)


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
    words = [f"word-{n}" for n in range(100)]
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
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    journal = fresh_journal()
    with RelayProcess.start(journal=journal, upstream=upstream.url) as relay:
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
    before = relay.metric("relay_readers_open")
    following = Following(relay.url, name, "one", wait_s=60)
    deadline = time.monotonic() + DEADLINE_S
    while relay.metric("relay_readers_open") <= before:
        assert time.monotonic() < deadline
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
        assert states[name][1:] == ["1 runs", "open"]
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
