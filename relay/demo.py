"""The sample agent that `relay demo` puts relay in front of.

It streams a fixed text word by word in three formats and serves the demo page. It knows nothing of relay:
it is what an ordinary backend looks like, and its counters show how often it was really called.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"

ANSWER = """\
relay sits between your agent and the people who read it. Every frame the agent sends is written to a \
journal first, under an id that only ever grows, and only then sent on. So a connection may break at any \
byte: the reader comes back with the last id it saw, and the journal goes on from there. Nothing is shown \
twice, and nothing is missing.

Try it now. Cut the connection while this text is still growing, or reload the page, or open it in a second \
tab. The agent does not notice. It keeps talking, relay keeps writing, and each reader catches up by itself. \
Look at the counters: the agent was called once, no matter how often you left.

When this answer is over, the journal says so in one last frame, and exactly one. Had the agent crashed in \
the middle, that frame would say that instead."""

ANSWERS = (
    ANSWER,
    """\
Every answer is a run, and a run ends exactly once. This one is still open while you read it. Press Stop, in \
this tab or in any other, and it ends as stopped: what was said so far stays, for everyone, and the agent is \
hung up on. To close a tab, or to lose the network, is something else. It ends nothing.

Press Regenerate, and the same question is asked again. In one step the old answer is marked as replaced and \
the new one begins, in every open tab, and Stop means the new one at once.

None of this lives in the page. A page holds one number, the cursor, and draws what the journal says. So a \
tab that was opened a minute late, or that slept through all of it, ends up with the same text as the tab \
that never left, word for word.""",
    """\
Things break in the other direction, too. Stop relay in its terminal while this text is growing, and start \
it again. The page will say that relay cannot be reached, try again by itself, and then show how this answer \
ended: what was said is still there, and its last frame says that it was lost. No answer is left open for \
ever, whoever died.

An agent that hangs up in the middle of a sentence is not taken for one that is done. An answer that nobody \
reads is not kept alive for nothing. And when the network only hiccups, nobody has to know: the browser \
comes back with its cursor, gets what it missed in one go, and goes on live where the journal ends. You may \
have seen those words on this page. They have a colour of their own, for a while.""",
)
"""What the agent says, in turns."""

WORDS = len(ANSWER.split())
PACE_MS = 35

WORDS_MAX = 100_000
TAKES_MAX = 1_000_000
PACE_MAX_MS = 60_000
PROMPT_ECHO_MAX_CHARS = 2000
CHATS_MAX = 10_000

STATIC_FILES = ("demo.css", "demo.js", "demo-conversation.js", "demo-instruments.js")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page runs and loads nothing but what comes from where it came from itself."""


def words(total: int, answer: str = ANSWER) -> list[str]:
    """An answer as `total` pieces that join to running text; it begins anew where it is too short."""
    pieces = re.findall(r"\s*\S+", answer)
    text = list(islice(cycle(["\n\n" + pieces[0], *pieces[1:]]), total))
    return [text[0].lstrip(), *text[1:]] if text else []


def sample_agent() -> Starlette:
    """An ASGI app with counters of its own.

    `POST /v1/chat/completions`, `GET /agent/stream?prompt=` (SSE), `GET /agent/ndjson?prompt=`, each with
    `?words=`, `?pace_ms=` and `?take=`, which of its texts it says. `GET /agent/stats` says how often each
    was asked to stream, and with `?chat=` how often by requests of that `?chat=`. Errors are JSON.
    """
    calls = Counter({"/v1/chat/completions": 0, "/agent/stream": 0, "/agent/ndjson": 0})
    chats: Counter[str] = Counter()
    numbers = count(1)

    def count_call(request: Request) -> None:
        calls[request.url.path] += 1
        if chat := request.query_params.get("chat"):
            chats[chat] += 1
            if len(chats) > CHATS_MAX:
                del chats[next(iter(chats))]

    async def chat_completions(request: Request) -> Response:
        paced = Paced(request)
        body = await json_object(request)
        messages, model = body.get("messages"), body.get("model", "sample")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, "'messages' must be a list with at least one message.")
        if not isinstance(model, str):
            raise HTTPException(400, "'model' must be a string.")
        head = {"id": f"chatcmpl-{next(numbers)}", "created": int(time.time()), "model": model}
        if not body.get("stream"):
            return JSONResponse(completion(head, paced.words))
        count_call(request)
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return event_stream(chat_chunks(head, paced, with_usage))

    async def stream(request: Request) -> Response:
        paced = Paced(request)
        count_call(request)
        return event_stream(plain_events(asked(request), paced))

    async def ndjson(request: Request) -> Response:
        paced = Paced(request)
        count_call(request)
        return StreamingResponse(ndjson_lines(asked(request), paced), media_type="application/x-ndjson")

    async def stats(request: Request) -> Response:
        chat = request.query_params.get("chat")
        counted = {"calls": calls} if chat is None else {"calls": calls, "chat": chats[chat]}
        return JSONResponse(counted, headers={"Cache-Control": "no-store"})

    return Starlette(
        routes=[
            Route("/", partial(static, "demo.html")),
            *(Route(f"/{name}", partial(static, name)) for name in STATIC_FILES),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/agent/stream", stream),
            Route("/agent/ndjson", ndjson),
            Route("/agent/stats", stats),
        ],
        exception_handlers={HTTPException: refused},
    )


class Paced:
    """The words of one answer and the time between two of them, as the query asks for them."""

    def __init__(self, request: Request) -> None:
        answer = ANSWERS[whole_number(request, "take", 0, TAKES_MAX) % len(ANSWERS)]
        self.words = words(whole_number(request, "words", len(answer.split()), WORDS_MAX), answer)
        self.pace_s = whole_number(request, "pace_ms", PACE_MS, PACE_MAX_MS) / 1000

    async def __aiter__(self) -> AsyncIterator[str]:
        for word in self.words:
            await asyncio.sleep(self.pace_s)
            yield word


def whole_number(request: Request, name: str, default: int, most: int) -> int:
    """A query parameter from 0 to `most`; raises 400."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or int(text) > most:
        raise HTTPException(400, f"'{name}' must be a whole number from 0 to {most}.")
    return int(text)


def asked(request: Request) -> str:
    """The prompt, of any length, cut to what a page wants to show; it does not change the answer."""
    prompt = request.query_params.get("prompt", "")
    return prompt if len(prompt) <= PROMPT_ECHO_MAX_CHARS else prompt[:PROMPT_ECHO_MAX_CHARS] + "…"


async def json_object(request: Request) -> dict[str, Any]:
    """The request's body; raises 400 where it is not a JSON object."""
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return body


def event_stream(events: AsyncIterator[bytes]) -> Response:
    """An SSE answer."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def sse(data: bytes, event: str = "") -> bytes:
    """One SSE event; JSON data never holds a line break."""
    return (b"event: %b\n" % event.encode() if event else b"") + b"data: %b\n\n" % data


async def plain_events(prompt: str, paced: Paced) -> AsyncIterator[bytes]:
    """`question` with the prompt, an unnamed event for each word, and `done`."""
    yield sse(orjson.dumps({"text": prompt}), "question")
    async for word in paced:
        yield sse(orjson.dumps({"text": word}))
    yield sse(orjson.dumps({"words": len(paced.words)}), "done")


async def ndjson_lines(prompt: str, paced: Paced) -> AsyncIterator[bytes]:
    """The same as `plain_events`, one JSON object a line."""
    yield orjson.dumps({"type": "question", "text": prompt}) + b"\n"
    async for word in paced:
        yield orjson.dumps({"type": "text", "text": word}) + b"\n"
    yield orjson.dumps({"type": "done", "words": len(paced.words)}) + b"\n"


async def chat_chunks(head: dict[str, Any], paced: Paced, with_usage: bool) -> AsyncIterator[bytes]:
    """`chat.completion.chunk` events as the OpenAI API sends them, `[DONE]` last."""
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return sse(orjson.dumps(head | {"choices": [choice]}))

    yield chunk({"role": "assistant", "content": ""})
    async for word in paced:
        yield chunk({"content": word})
    yield chunk({}, "stop")
    if with_usage:
        yield sse(orjson.dumps(head | {"choices": [], "usage": usage(paced.words)}))
    yield sse(b"[DONE]")


def completion(head: dict[str, Any], answer: list[str]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    message = {"role": "assistant", "content": "".join(answer)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage(answer)}


def usage(answer: list[str]) -> dict[str, int]:
    """Token counts; this agent counts words, and reads nothing."""
    return {"prompt_tokens": 0, "completion_tokens": len(answer), "total_tokens": len(answer)}


async def static(name: str, request: Request) -> Response:
    """A file of the demo page."""
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    return FileResponse(STATIC / name, headers=headers)


async def refused(request: Request, error: Exception) -> Response:
    """A refusal as the OpenAI API words it."""
    assert isinstance(error, HTTPException)
    body = {"error": {"message": error.detail, "type": "invalid_request_error"}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
