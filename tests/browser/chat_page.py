"""A page that reads streams with relay-stream.js, as relay serves it, and notes what it is told."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import BrowserContext, Page, Request, TimeoutError
from scripted_upstream import Exchange, ScriptedUpstream

DEADLINE_MS = 60_000

# What a tab shows of a chat outlives its reloads in sessionStorage, as its cursor does.
PAGE = b"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>chats</title><link rel="icon" href="data:,"></head>
<body><script type="module">
import * as client from "/relay/static/relay-stream.js";
const chats = {};
function open(stream, options = {}) {
  const kept = JSON.parse(sessionStorage.getItem(`shown ${stream}`));
  const chat = { text: "", ids: [], control: [], ...kept, states: [], end: null, error: null };
  const keep = () => {
    const { text, ids, control } = chat;
    sessionStorage.setItem(`shown ${stream}`, JSON.stringify({ text, ids, control }));
  };
  chats[stream] = chat;
  chat.subscription = client.subscribe(stream, {
    store: { key: `cursor ${stream}` },
    onFrame(frame) {
      chat.text += frame.data;
      chat.ids.push(frame.id);
      keep();
    },
    onControl(control) {
      chat.control.push(control);
      keep();
    },
    onState: (state, error) => chat.states.push(error ? `${state}: ${error}` : state),
    onError: (error) => (chat.error = `${error.code ?? ""} ${error.message}`),
    onEnd: (end) => (chat.end = end.reason),
    ...options,
  });
}
Object.assign(window, { client, chats, open });
</script></body>
</html>"""

OWN_TIME = """
// Pauses that are not short never end: what goes on nevertheless was woken by something else.
const begin = setTimeout;
window.setTimeout = (callback, ms, ...rest) => (ms < 200 ? begin(callback, ms, ...rest) : 0);
Math.random = () => 1;
"""

ONLINE_WHEN_THERE_IS_A_WAY = """
// The browser's network, a process of its own, may learn that it is online a moment after the page was told.
addEventListener("online", async (event) => {
  if (!event.isTrusted) return;
  event.stopImmediatePropagation();
  while (!(await fetch("/chats").catch(() => null)));
  dispatchEvent(new Event("online"));
});
"""


def serve_chat_page(upstream: ScriptedUpstream) -> None:
    """Have upstream serve the page at `/chats`."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", PAGE, "text/html")

    upstream.on("/chats", handler)


class ChatPage:
    """A tab, and what its client was told."""

    def __init__(self, context: BrowserContext, url: str, before: str = "") -> None:
        self.page: Page = context.new_page()
        self.asked: list[str] = []
        self.page.on("request", self._asked)
        if before:
            self.page.add_init_script(before)
        self.go(url)

    def go(self, url: str) -> None:
        """Open the page anew."""
        answer = self.page.goto(f"{url}/chats")
        assert answer is not None
        assert answer.ok, answer.text()
        self._await_client()

    def reload(self) -> None:
        """As a person does."""
        self.page.reload()
        self._await_client()

    def _await_client(self) -> None:
        self.page.wait_for_function("window.open !== undefined && window.client !== undefined")

    def _asked(self, request: Request) -> None:
        if "/events" in request.url:
            self.asked.append(request.url)

    def open(self, stream: str, **options: Any) -> None:
        """Subscribe."""
        self.page.evaluate("([stream, options]) => open(stream, options)", [stream, options])

    def close(self, stream: str) -> None:
        """Leave one chat."""
        self.page.evaluate("stream => chats[stream].subscription.close()", stream)

    def look(self, stream: str, expression: str) -> Any:
        """A member of what is noted of a chat: `text`, `ids`, `end`, `subscription.role`, …"""
        return self.page.evaluate(f"stream => chats[stream].{expression}", stream)

    def await_(self, stream: str, condition: str, arg: Any = None) -> None:
        """Wait for a condition on `chat` and `arg`."""
        script = f"([stream, arg]) => {{ const chat = chats[stream]; return {condition}; }}"
        try:
            self.page.wait_for_function(script, arg=[stream, arg])
        except TimeoutError as error:
            noted = {key: self.look(stream, key) for key in ("states", "error", "end", "control", "ids")}
            raise AssertionError(f"{condition} did not come true with {arg!r}: {noted}") from error

    def await_text(self, stream: str, text: str) -> None:
        """Wait until as much is shown, and look whether it is this."""
        length = len(text.encode("utf-16-le")) // 2  # as JavaScript counts
        self.await_(stream, "chat.text.length >= arg", length)
        assert self.look(stream, "text") == text

    def expect_whole(self, stream: str, text: str) -> None:
        """This text, of frames that all came once, in order."""
        self.await_text(stream, text)
        seqs = [int(frame_id.partition("-")[0]) for frame_id in self.look(stream, "ids")]
        assert seqs == sorted(set(seqs))

    def await_answer(self, question: str) -> None:
        """Wait until the promise of a JavaScript expression is for something true; asked again and again."""
        script = f"""async (deadline_ms) => {{
            for (const until = Date.now() + deadline_ms; Date.now() < until; ) {{
                if (await ({question})) return true;
                await new Promise((resolve) => setTimeout(resolve, 20));
            }}
            return false;
        }}"""
        assert self.page.evaluate(script, DEADLINE_MS), f"not true in time: {question}"

    def await_no_lock(self) -> None:
        """Wait until no tab of this origin reads for others, or waits to do so."""
        self.await_answer(
            "navigator.locks.query().then(({ held, pending }) => !held.length && !pending.length)"
        )

    def await_readers(self, count: int) -> None:
        """Wait until relay serves so many readers."""
        self._await_readers(f"== {count}")

    def await_readers_at_most(self, count: int) -> None:
        """Wait until relay serves no more than so many readers: of one that has left, it hears a moment after
        the next one has come."""
        self._await_readers(f"<= {count}")

    def _await_readers(self, condition: str) -> None:
        metrics = "fetch('/relay/metrics').then((answer) => answer.text())"
        self.await_answer(f"{metrics}.then((text) => /^relay_readers_open (.+)/m.exec(text)[1] {condition})")
