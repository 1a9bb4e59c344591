"""A chat agent in FastAPI. It streams, counts and keeps answers; cuts and reloads are relay's affair."""

import asyncio
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

PACE_S = float(os.environ.get("PACE_S", "0.1"))
COUNTED = " ".join(str(number) for number in range(1, 51))

webhook = Webhook(os.environ["RELAY_WEBHOOK_SECRET"])

app = FastAPI()
counts = Counter(asked=0, left=0)
messages = sqlite3.connect("messages.db", check_same_thread=False)
messages.execute("CREATE TABLE IF NOT EXISTS answers (run PRIMARY KEY, chat, status, reason, text)")


class Question(BaseModel):
    question: str = Field(max_length=1000)


@app.post("/chat/{chat}")
async def ask(chat: str, asked: Question) -> StreamingResponse:
    """Answer, word by word. `Relay-Stream` tells relay which conversation this is, and `Relay-Metadata` what
    every tab is to be told of the answer before its first word."""
    counts["asked"] += 1
    headers = {"Relay-Stream": chat, "Relay-Metadata": json.dumps({"question": asked.question})}
    return StreamingResponse(answer(asked.question), media_type="text/event-stream", headers=headers)


async def answer(question: str) -> AsyncIterator[str]:
    try:
        question = " ".join(question.split())  # an event's data is one line
        for word in re.findall(r"\S+ ?", f"You asked: {question} And so I count to fifty: {COUNTED}"):
            yield f"data: {word}\n\n"
            await asyncio.sleep(PACE_S)
    except asyncio.CancelledError:
        # The connection broke. Without relay that is any reload or tunnel; relay only leaves when the answer
        # was stopped, or replaced, or its time is over. So here is the place to stop the model.
        counts["left"] += 1
        raise


@app.post("/on-run-end", status_code=204)
async def on_run_end(request: Request) -> None:
    """relay says how an answer ended, and what was shown of it, at least once: hence the key."""
    try:
        transcript = webhook.verify(await request.body(), dict(request.headers))["data"]
    except WebhookVerificationError:
        raise HTTPException(401) from None
    row = [transcript[member] for member in ("run", "stream", "status", "reason", "text")]
    with messages:
        messages.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)


@app.get("/chat/{chat}")
async def kept(chat: str) -> list[dict]:
    """The answers of a conversation that are over."""
    found = messages.execute("SELECT status, reason, text FROM answers WHERE chat = ? ORDER BY rowid", [chat])
    return [{"status": status, "reason": reason, "text": text} for status, reason, text in found]


@app.get("/counts")
async def how_often() -> Counter:
    """How often an answer was asked for, and how often whoever asked was gone before its end."""
    return counts


@app.get("/")
async def page() -> FileResponse:
    return FileResponse("index.html")
