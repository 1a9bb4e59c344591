"""nginx in front of relay, as the example configures it: HTTP/2 to curl and to Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser
from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

from examples.example import Example, body_of, whole_events

STREAMS = 30
FIRST, LAST = b"data: first\n\n", b"data: last\n\n"
DEADLINE_S = 60

PAGE = b"""<!doctype html>
<title>many</title><link rel="icon" href="data:,">
<script>
  let first = 0, last = 0;
  for (let number = 0; number < %d; number += 1) {
    const answer = new EventSource(`stream?number=${number}`);
    answer.onmessage = ({ data }) => {
      if (data === "first") first += 1;
      if (data === "last") (last += 1), answer.close();
    };
  }
</script>"""


class Curl:
    """curl in a process of its own, and its answer as it comes."""

    def __init__(self, url: str, *arguments: str) -> None:
        command = ["curl", "-kisSN", "--http2", "--max-time", str(DEADLINE_S), url, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._raw = b""
        self.head = self._until(b"\r\n\r\n").decode()
        self._unpack = zlib.decompressobj(31).decompress if "gzip" in self.head else bytes
        self.body = self._unpack(self._raw)

    def _until(self, words: bytes) -> bytes:
        while words not in self._raw:
            self._raw += self._read()
        found, end, self._raw = self._raw.partition(words)
        return found + end

    def _read(self) -> bytes:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        data = os.read(self.process.stdout.fileno(), 65536)
        assert data, self.process.stderr.read()
        return data

    def await_words(self, words: bytes, times: int = 1) -> None:
        """Read until the body holds these so often."""
        while self.body.count(words) < times:
            self.body += self._unpack(self._read())

    def headers(self, name: str) -> list[str]:
        """The values of a header, one for each time it is there."""
        return re.findall(rf"^{name}: (.*?)\r$", self.head, re.MULTILINE)

    def end(self) -> int:
        """Read to the end; curl's exit code."""
        rest, _ = self.process.communicate(timeout=DEADLINE_S)
        self.body += self._unpack(rest)
        return self.process.returncode

    def __enter__(self) -> Curl:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Scene(NamedTuple):
    """The example, running in front of a scripted backend."""

    example: Example
    relay: RelayProcess
    upstream: ScriptedUpstream

    @property
    def url(self) -> str:
        return f"https://localhost:{self.example.ports[8443]}"


def made(copy: Callable[..., Example]) -> Example:
    """A copy with its certificate."""
    for program in ("nginx", "openssl", "curl"):
        if shutil.which(program) is None and shutil.which(f"/usr/sbin/{program}") is None:
            pytest.fail(f"These tests need {program}. `python3 dev.py setup` installs it.")
    example = copy("nginx", 8443, 8080)
    example.shell(example.command("openssl"))
    return example


@pytest.fixture(scope="module")
def scene(copy: Callable[..., Example], upstream: ScriptedUpstream) -> Iterator[Scene]:
    example = made(copy)
    settings = {"upstream": upstream.url, "port": example.ports[8080], "heartbeat_s": 0.1}
    with example.relay(**settings) as relay, example.server("nginx -e", 8443):
        yield Scene(example, relay, upstream)


def test_the_commands_of_the_readme_cut_and_resume_an_answer(copy: Callable[..., Example]) -> None:
    example = made(copy)
    with example.server("relay demo", 8080), example.server("nginx -e", 8443):
        asking = example.command("-m 1").replace("hello", "hello&words=50").replace("-m 1", "-m 60")
        begun = whole_events(example.shell(f"{asking} | head -n 40"))
        last = re.findall(r"^id: (\S+)$", begun, re.MULTILINE)[-1]
        rest = example.shell(example.command("Last-Event-ID").replace("ID: ID", f"ID: {last}"))
        ids = re.findall(r"^id: rly\.\S+\.(\d+)-\d+$", begun + rest, re.MULTILINE)
        assert [int(id_) for id_ in ids] == list(range(int(ids[0]), int(ids[0]) + 52))
        assert rest.endswith('data: {"words":50}\n\n')
        calls = json.loads(body_of(example.url(8080, "/agent/stats")))["calls"]
        assert calls["/agent/stream"] == 1


def hold(upstream: ScriptedUpstream, name: str) -> Callable[[], None]:
    """Script an answer that waits between its first and its last event; gives what lets it go on."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(FIRST)
        await gate.wait()
        await exchange.chunk(LAST)
        await exchange.end()

    upstream.on(f"/{name}/stream", handler)
    return gate.open


def test_a_page_holds_many_streams_at_once_over_one_connection(
    scene: Scene, browser: Browser, name: str
) -> None:
    let_go = hold(scene.upstream, name)

    async def page_of(exchange: Exchange) -> None:
        await exchange.answer("200 OK", PAGE % STREAMS, "text/html")

    scene.upstream.on(f"/{name}/page", page_of)
    context = browser.new_context(ignore_https_errors=True)
    try:
        page = context.new_page()
        page.goto(f"{scene.url}/{name}/page")
        page.wait_for_function(f"first === {STREAMS}", timeout=DEADLINE_S * 1000)
        assert page.evaluate("last") == 0
        let_go()
        page.wait_for_function(f"last === {STREAMS}", timeout=DEADLINE_S * 1000)
        assert page.evaluate("first") == STREAMS
        spoken = "performance.getEntriesByType('navigation').map((entry) => entry.nextHopProtocol)"
        assert page.evaluate(spoken) == ["h2"]
    finally:
        context.close()
    assert scene.upstream.calls(f"/{name}/stream") == STREAMS


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_a_frame_is_there_while_the_answer_goes_on_compressed_once_or_not_at_all(
    scene: Scene, name: str, coding: str
) -> None:
    let_go = hold(scene.upstream, name)
    with Curl(f"{scene.url}/{name}/stream", "-H", f"Accept-Encoding: {coding}") as curl:
        assert curl.head.startswith("HTTP/2 200")
        assert curl.headers("content-encoding") == ([coding] if coding == "gzip" else [])
        curl.await_words(FIRST)
        assert LAST not in curl.body
        let_go()
        curl.await_words(LAST)
        assert curl.end() == 0


def test_one_that_was_cut_goes_on_behind_its_last_event(scene: Scene, name: str) -> None:
    let_go = hold(scene.upstream, name)
    with Curl(f"{scene.url}/{name}/stream") as curl:
        curl.await_words(FIRST)
    (cursor,) = re.findall(rb"^id: (\S+)$", curl.body, re.MULTILINE)
    with Curl(f"{scene.url}/{name}/stream", "-H", f"Last-Event-ID: {cursor.decode()}") as curl:
        let_go()
        curl.await_words(LAST)
        assert curl.end() == 0
        assert FIRST not in curl.body
    assert scene.upstream.calls(f"/{name}/stream") == 1


def test_heartbeats_keep_a_silent_answer_open_beyond_the_read_timeout(
    scene: Scene, copy: Callable[..., Example], name: str
) -> None:
    hasty = made(copy)
    config = hasty.directory / "nginx.conf"
    text = config.read_text().replace(str(hasty.ports[8080]), str(scene.relay.port))
    config.write_text(text.replace("proxy_read_timeout 1h", "proxy_read_timeout 4s"))
    assert "4s" in config.read_text()
    let_go = hold(scene.upstream, name)
    url = f"https://localhost:{hasty.ports[8443]}/{name}/stream"
    with hasty.server("nginx -e", 8443), Curl(url) as curl:
        curl.await_words(b": hb\n", 45)  # of which ten are a second
        let_go()
        curl.await_words(LAST)
        assert curl.end() == 0


def test_an_answer_that_broke_off_is_not_taken_for_a_whole_one(scene: Scene, name: str) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(FIRST)
        await exchange.send(b"fff\r\ndata: la")
        exchange.writer.close()

    scene.upstream.on(f"/{name}/stream", handler)
    with Curl(f"{scene.url}/{name}/stream") as curl:
        assert curl.end() != 0
        assert curl.body.endswith(FIRST)


def test_a_client_behind_it_does_not_choose_the_stream(scene: Scene, name: str) -> None:
    hold(scene.upstream, name)()
    with Curl(f"{scene.url}/{name}/stream", "-H", f"Relay-Stream: {name}") as curl:
        assert curl.end() == 0
        assert curl.headers("relay-stream") != [name]
    with Reading(f"{scene.relay.url}/{name}/stream", Relay_Stream=name) as reading:
        assert reading.headers["relay-stream"] == name


def test_what_a_producer_pushes_is_read_while_its_body_goes_on(scene: Scene, name: str) -> None:
    runs = f"{scene.url}/relay/v1/streams/{name}/runs?end=completed"
    events = f"{scene.url}/relay/v1/streams/{name}/events?run=current&wait=60"
    pushing = subprocess.Popen(
        ["curl", "-ksS", "--http2", "-X", "POST", "-T-", "-H", "Content-Type: application/x-ndjson", runs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert pushing.stdin is not None
    pushing.stdin.write(b'{"data": "first"}\n')
    pushing.stdin.flush()
    with Curl(events) as curl:
        curl.await_words(FIRST)
        said, _ = pushing.communicate(b'{"data": "last"}\n', timeout=DEADLINE_S)
        assert json.loads(said)["status"] == "completed"
        curl.await_words(LAST)
        assert curl.end() == 0
