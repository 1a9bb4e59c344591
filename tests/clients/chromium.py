"""A page in Chromium that reads with the browser's own EventSource, or with relay-stream.js."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import BrowserContext, TimeoutError
from recorded_answers import RAW
from scripted_upstream import Exchange, ScriptedUpstream

from clients.events_route import EventsRouteClient
from clients.notes import Client, Kit, Notes, Wish

PAGE = b"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>clients</title><link rel="icon" href="data:,"></head>
<body><script type="module">
import { ask, subscribe } from "/relay/static/relay-stream.js";

const notes = [];
const readers = {
  eventSource({ path }, note) {
    const source = new EventSource(path);
    let ended = null;
    source.onmessage = ({ data }) => (note.text += data);
    source.addEventListener("relay", ({ data }) => {
      const control = JSON.parse(data);
      if (control.type === "run.ended") ended = control;
    });
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return;
      const whole = !ended || ended.status === "completed";
      note.end = whole ? "whole" : `error: ${ended.error ?? ended.reason}`;
    };
  },

  async relayStream({ path, key, stream }, note) {
    let ended;
    const callbacks = {
      onFrame: ({ data }) => (note.text += data),
      onControl: (control) => void (control.type === "run.ended" && (ended = control)),
    };
    const reading = stream
      ? subscribe(stream, { run: "current", ...callbacks })
      : await ask(path, { headers: { "Idempotency-Key": key } }, callbacks);
    const { error } = await reading.done;
    const whole = !error && ended?.status === "completed";
    note.end = whole ? "whole" : `error: ${error?.message ?? ended?.error ?? ended?.reason}`;
  },
};

function read(how, wish) {
  notes.push({ text: "", end: null });
  readers[how](wish, notes.at(-1));
  return notes.length - 1;
}
Object.assign(window, { notes, read });
</script></body>
</html>"""


def serve_clients_page(upstream: ScriptedUpstream) -> None:
    """Have upstream serve the page at `/clients`."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", PAGE, "text/html")

    upstream.on("/clients", handler)


class ClientsPage:
    """A tab with the page."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self._page = context.new_page()
        answer = self._page.goto(f"{url}/clients")
        assert answer is not None
        assert answer.ok, answer.text()
        self._page.wait_for_function("window.read !== undefined")

    def read(self, how: str, wish: dict[str, str]) -> PageNotes:
        return PageNotes(self, self.evaluate("([how, wish]) => read(how, wish)", [how, wish]))

    def evaluate(self, script: str, arg: Any) -> Any:
        return self._page.evaluate(script, arg)

    def wait_for(self, condition: str, arg: Any) -> None:
        self._page.wait_for_function(condition, arg=arg)


class PageNotes(Notes):
    """What one reader of it noted, looked at when asked for."""

    def __init__(self, page: ClientsPage, number: int) -> None:
        super().__init__()
        self._page = page
        self._number = number

    def _look(self, member: str) -> Any:
        return self._page.evaluate("([number, member]) => notes[number][member]", [self._number, member])

    @property
    def text(self) -> str:
        return str(self._look("text"))

    def await_text(self, text: str) -> None:
        self._wait_for("notes[number].text === arg", text)

    def await_end(self) -> str:
        self._wait_for("notes[number].end !== null", None)
        return str(self._look("end"))

    def _wait_for(self, condition: str, arg: Any) -> None:
        try:
            self._page.wait_for(f"([number, arg]) => {condition}", [self._number, arg])
        except TimeoutError as error:
            noted = self._look("text"), self._look("end")
            raise AssertionError(f"{condition} did not come true with {arg!r}: {noted}") from error


class RelayStreamInChromium(Client):
    """`ask`, and `subscribe` for those who join."""

    answer = RAW

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        path = f"/{wish.name}{self.answer.path}"
        return kit.open_page(wish.url).read("relayStream", {"path": path, "key": wish.name})

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        return cut

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.open_page(wish.url).read("relayStream", {"stream": wish.name})


class EventSourceInChromium(Client):
    """On the backend's own path. The way to join is `--resume-route`."""

    answer = RAW

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        path = f"/{wish.name}{self.answer.path}"
        return kit.open_page(wish.url).read("eventSource", {"path": path})

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        return cut

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.open_page(wish.url).read("eventSource", {"path": f"/{wish.name}/answer"})


class EventSourceInChromiumOnEvents(EventsRouteClient):
    """On the events route."""

    answer = RAW

    def join(self, kit: Kit, wish: Wish) -> Notes:
        events = f"/relay/v1/streams/{wish.name}/events?run=latest"
        return kit.open_page(wish.url).read("eventSource", {"path": events})
