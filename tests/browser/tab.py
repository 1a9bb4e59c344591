"""A page that reads event streams with the browser's own EventSource, and shows the text it gets."""

from __future__ import annotations

import socket

from playwright.sync_api import Page, Response
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

# All that reads is `new EventSource(url)`. What is noted beside the text is for the test to look at.
READER = b"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>reader</title><link rel="icon" href="data:,"></head>
<body><pre id="text"></pre><script>
const text = document.getElementById("text");
const frames = [];
const control = [];
let source;
function read(url) {
  source = new EventSource(url);
  source.onmessage = (message) => {
    text.textContent += message.data;
    frames.push(message.lastEventId);
  };
  source.addEventListener("relay", (message) => control.push(JSON.parse(message.data).type));
}
const url = new URLSearchParams(location.search).get("read");
if (url) read(url);
</script></body>
</html>"""


def serve_reader_page(upstream: ScriptedUpstream) -> None:
    """Have upstream serve the page at `/reader`, as any backend serves its own."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", READER, "text/html")

    upstream.on("/reader", handler)


RETRY_MS = 5
"""How soon browsers come back to the relays of these tests."""


class Tab:
    """A page and what its EventSource was answered."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self._answers: list[Response] = []
        page.on("response", self._answered)
        answer = page.goto(url)
        assert answer is not None
        assert answer.ok, answer.text()

    def _answered(self, response: Response) -> None:
        if response.request.resource_type == "eventsource":
            self._answers.append(response)

    @property
    def statuses(self) -> list[int]:
        """Of each answer."""
        return [answer.status for answer in self._answers]

    def header(self, number: int, name: str) -> str:
        """Of one answer."""
        while len(self._answers) <= number:  # news of an answer may come after what it did to the page
            self.page.wait_for_event("response")
        return self._answers[number].headers[name]

    def read(self, url: str) -> None:
        """Open the EventSource."""
        self.page.evaluate("url => read(url)", url)

    def text(self) -> str:
        """What stands on the page."""
        return str(self.page.evaluate("text.textContent"))

    def frames(self) -> list[str]:
        """The `lastEventId` of every message event."""
        return list(self.page.evaluate("frames"))

    def control(self) -> list[str]:
        """The types of the control frames that were shown."""
        return list(self.page.evaluate("control"))

    def await_control(self, type_: str, count: int = 1) -> None:
        """Wait until so many control frames of a type were shown."""
        self.page.wait_for_function(
            "([type, count]) => control.filter((other) => other === type).length >= count", arg=[type_, count]
        )

    def await_text(self, text: str) -> None:
        """Wait until the page shows at least as much."""
        length = len(text.encode("utf-16-le")) // 2  # as JavaScript counts
        self.page.wait_for_function("length => text.textContent.length >= length", arg=length)

    def await_closed(self) -> None:
        """Wait until a 204 has stopped the EventSource for good: by the standard it never asks again."""
        self.page.wait_for_function("source.readyState === EventSource.CLOSED")
        if 204 not in self.statuses:  # news of an answer may come after what it did to the page
            self.page.wait_for_event("response", lambda response: response.status == 204)


def first_bytes(relay: RelayProcess, path: str, end: bytes) -> bytes:
    """The bytes of an answer to a browser's EventSource, through the first `end`."""
    lines = ("Host: localhost", "Accept: text/event-stream", "Sec-Fetch-Dest: empty", "", "")
    head = "\r\n".join((f"GET {path} HTTP/1.1", *lines))
    data = b""
    with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as connection:
        connection.sendall(head.encode())
        while end not in data:
            received = connection.recv(65536)
            assert received, data
            data += received
    return data[: data.index(end) + len(end)]


def one_answer_each(request: bytes) -> bytes:
    """Have a connection closed behind its answer, in the way of `TcpProxy.to_server`. On one that is kept, a
    cut might fall into the head of a later answer, before its content type."""
    return request.replace(b"\r\nConnection: keep-alive\r\n", b"\r\nConnection: close\r\n")


def behind_content_type(relay: RelayProcess, path: str) -> int:
    """After how many bytes an answer's content type is known, where cuts may begin.

    Over plain HTTP Chromium takes a head that is closed early for a whole one, and an EventSource whose
    answer has no content type gives up for ever. So relay's stands first.
    """
    status, content_type, *_ = first_bytes(relay, path, b"\r\n\r\n").splitlines(keepends=True)
    assert content_type.startswith(b"content-type: text/event-stream")
    return len(status + content_type)
