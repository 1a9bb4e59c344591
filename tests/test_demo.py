"""The sample agent: an ordinary backend with three streaming formats, and the page that shows relay off."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

import pytest
from starlette.applications import Starlette

from relay import demo
from relay.demo import ANSWER, ANSWERS, WORDS, sample_agent, words


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    parts: list[bytes]

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str, str]]:
        """(event, data) of each SSE event; every one here has exactly one data line."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
        return [(field.get("event", ""), field["data"]) for field in fields]


def call(app: Starlette, target: str, body: bytes | None = None) -> Answer:
    """One request straight into the ASGI app; the client stays until the answer is over."""
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"agent.test"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    sent: list[dict[str, Any]] = []

    async def exchange() -> None:
        requests = [{"type": "http.request", "body": body or b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not requests:
                await asyncio.Event().wait()
            return requests.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(exchange())
    start, *rest = sent
    headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    parts = [part["body"] for part in rest if part.get("body")]
    return Answer(start["status"], headers, b"".join(parts), parts)


@pytest.fixture
def agent() -> Starlette:
    return sample_agent()


def chat(agent: Starlette, query: str = "pace_ms=0", **body: Any) -> Answer:
    request = {"messages": [{"role": "user", "content": "hi"}]} | body
    return call(agent, f"/v1/chat/completions?{query}", json.dumps(request).encode())


def test_the_words_join_to_the_text() -> None:
    assert "".join(words(WORDS)) == ANSWER
    assert 120 <= WORDS <= 180


def test_more_words_than_the_text_has_begin_it_anew() -> None:
    assert "".join(words(2 * WORDS)) == f"{ANSWER}\n\n{ANSWER}"
    assert words(0) == []


def test_a_chat_completion_streams_role_then_words_then_finish_reason_then_done(agent: Starlette) -> None:
    answer = chat(agent, stream=True, model="m")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events()
    assert last == ("", "[DONE]")
    chunks = [json.loads(data) for _, data in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"m"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_every_event_is_a_write_of_its_own(agent: Starlette) -> None:
    answer = chat(agent, stream=True)
    assert len(answer.parts) == len(answer.events()) == WORDS + 3


def test_usage_comes_before_done_when_it_is_asked_for(agent: Starlette) -> None:
    answer = chat(agent, "pace_ms=0&words=3", stream=True, stream_options={"include_usage": True})
    chunk = json.loads(answer.events()[-2][1])
    assert chunk["choices"] == []
    assert chunk["usage"]["completion_tokens"] == 3


def test_a_chat_completion_without_stream_is_one_json_object(agent: Starlette) -> None:
    answer = chat(agent)
    assert answer.status == 200
    assert answer.json()["object"] == "chat.completion"
    [choice] = answer.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"{}", b'{"messages": []}', b'{"messages": [1], "model": 1}']
)
def test_a_bad_chat_body_is_400_json(agent: Starlette, body: bytes) -> None:
    answer = call(agent, "/v1/chat/completions", body)
    assert answer.status == 400
    assert answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("query", ["words=-1", "words=x", "words=1000000", "pace_ms=1.5", "pace_ms=99999"])
@pytest.mark.parametrize("path", ["/agent/stream", "/agent/ndjson"])
def test_a_bad_pace_is_400_json(agent: Starlette, path: str, query: str) -> None:
    answer = call(agent, f"{path}?{query}")
    assert answer.status == 400
    assert "whole number" in answer.json()["error"]["message"]


def test_plain_sse_is_the_question_then_unnamed_words_then_done(agent: Starlette) -> None:
    answer = call(agent, "/agent/stream?prompt=why%3F%0Anow&pace_ms=0")
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *middle, last = answer.events()
    assert first == ("question", '{"text":"why?\\nnow"}')
    assert {event for event, _ in middle} == {""}
    assert "".join(json.loads(data)["text"] for _, data in middle) == ANSWER
    assert last == ("done", json.dumps({"words": WORDS}, separators=(",", ":")))


def test_ndjson_says_the_same_one_object_a_line(agent: Starlette) -> None:
    answer = call(agent, "/agent/ndjson?prompt=why&pace_ms=0")
    assert answer.headers["content-type"] == "application/x-ndjson"
    first, *middle, last = [json.loads(line) for line in answer.body.splitlines()]
    assert first == {"type": "question", "text": "why"}
    assert "".join(line["text"] for line in middle) == ANSWER
    assert last == {"type": "done", "words": WORDS}


def test_the_agent_has_several_answers_and_takes_turns(agent: Starlette) -> None:
    def text(query: str) -> str:
        events = call(agent, f"/agent/stream?pace_ms=0&{query}").events()
        return "".join(json.loads(data)["text"] for event, data in events if event == "")

    assert [text(f"take={take}") for take in range(4)] == [*ANSWERS, ANSWER]
    assert text("take=1&words=3") == "Every answer is"
    assert call(agent, "/agent/stream?take=-1").status == 400


@pytest.mark.parametrize("length", [0, 1, 2000, 2001, 1_000_000])
def test_a_prompt_may_have_any_length(agent: Starlette, length: int) -> None:
    answer = call(agent, f"/agent/stream?pace_ms=0&words=1&prompt={'x' * length}")
    shown = json.loads(answer.events()[0][1])["text"]
    assert shown == "x" * min(length, 2000) + ("…" if length > 2000 else "")


def test_no_words_is_an_answer_without_text(agent: Starlette) -> None:
    assert [event for event, _ in call(agent, "/agent/stream?words=0").events()] == ["question", "done"]


def test_stats_count_what_was_asked_to_stream(agent: Starlette) -> None:
    call(agent, "/agent/stream?words=0")
    call(agent, "/agent/stream?words=0")
    call(agent, "/agent/stream?words=x")
    call(agent, "/agent/ndjson?words=0")
    chat(agent)
    chat(agent, "words=0", stream=True)
    stats = call(agent, "/agent/stats")
    assert stats.headers["cache-control"] == "no-store"
    assert stats.json()["calls"] == {"/v1/chat/completions": 1, "/agent/stream": 2, "/agent/ndjson": 1}


def test_stats_count_the_calls_of_a_chat(agent: Starlette) -> None:
    for chat_name in ("a", "b", "a", ""):
        call(agent, f"/agent/stream?words=0&chat={chat_name}")
    counts = {name: call(agent, f"/agent/stats?chat={name}").json()["chat"] for name in ("a", "b", "c")}
    assert counts == {"a": 2, "b": 1, "c": 0}
    assert "chat" not in call(agent, "/agent/stats").json()


def test_the_chats_that_are_counted_are_bounded(agent: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CHATS_MAX", 2)
    for chat_name in ("a", "b", "c"):
        call(agent, f"/agent/stream?words=0&chat={chat_name}")
    counts = [call(agent, f"/agent/stats?chat={name}").json()["chat"] for name in ("a", "b", "c")]
    assert counts == [0, 1, 1]


def test_two_agents_count_apart(agent: Starlette) -> None:
    call(agent, "/agent/stream?words=0")
    assert call(sample_agent(), "/agent/stats").json()["calls"]["/agent/stream"] == 0


def test_the_words_come_at_the_pace_that_was_asked_for(
    agent: Starlette, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def sleep(delay_s: float) -> None:
        waited.append(delay_s)

    monkeypatch.setattr("relay.demo.asyncio.sleep", sleep)
    call(agent, "/agent/stream?words=3&pace_ms=250")
    assert waited == [0.25] * 3


PAGE = {
    "/": "text/html",
    "/demo.css": "text/css",
    "/demo.js": "javascript",
    "/demo-conversation.js": "javascript",
    "/demo-instruments.js": "javascript",
}


@pytest.mark.parametrize(("path", "kind"), PAGE.items())
def test_the_page_and_its_files_are_served(agent: Starlette, path: str, kind: str) -> None:
    answer = call(agent, path)
    assert answer.status == 200
    assert kind in answer.headers["content-type"]
    assert answer.body
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_the_page_loads_nothing_from_elsewhere(agent: Starlette) -> None:
    for path in PAGE:
        text = (
            call(agent, path).body.decode().replace("http://www.w3.org/2000/svg", "")
        )  # a name, of the icon
        assert "http:" not in text
        assert "https:" not in text
        assert "//cdn" not in text
