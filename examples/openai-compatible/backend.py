"""A stand-in for a model server: `POST /v1/chat/completions` as the OpenAI API streams it, word by word.

It needs nothing but what relay brings along. `GET /calls` says how often it was asked.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

PACE_S = float(os.environ.get("PACE_S", "0.1"))
ANSWER = ["Counting to forty:", *(f" {number}" for number in range(1, 41))]

calls = 0


async def chat_completions(request: Request) -> StreamingResponse:
    global calls
    calls += 1
    asked = await request.json()
    return StreamingResponse(chunks(f"chatcmpl-{calls}", asked["model"]), media_type="text/event-stream")


async def chunks(name: str, model: str) -> AsyncIterator[str]:
    head = {"id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    def chunk(finish_reason: str | None = None, **delta: str) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    yield chunk(role="assistant", content="")
    for word in ANSWER:
        yield chunk(content=word)
        await asyncio.sleep(PACE_S)
    yield chunk("stop")
    yield "data: [DONE]\n\n"


async def how_often(request: Request) -> JSONResponse:
    return JSONResponse({"calls": calls})


app = Starlette(
    routes=[
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/calls", how_often),
    ]
)
