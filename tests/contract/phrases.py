"""What the contract's tests say to a journal, and how they look at what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from relay.cursor import ORIGIN, Cursor
from relay.frame import Event, Frame, is_terminal
from relay.journal.base import Append, EndedRun, Journal, Page, RunOpening
from relay.lifecycle import Reason, ending
from relay.limits import Retention

T = TypeVar("T")

DEADLINE_S = 60.0
MIB = 1024 * 1024
ROOMY = 64 * MIB
COMPLETED = ending(Reason.PRODUCER_END)
FAILED = ending(Reason.PRODUCER_FAILED, 'the "model" broke\n')
CANCELLED = ending(Reason.CLIENT_CANCEL)
LOST = ending(Reason.OWNER_LOST)
PROXIED = '{"status":200}'
"""What makes a run one that was proxied."""
ERROR_EVENT = Event("error", b'{"error":"it is over"}')
ERROR_EVENTS = {"openai-chat": ERROR_EVENT}


def opening(stream: str, run: str = "r1", **changes: Any) -> RunOpening:
    token = f"token-{stream}-{run}"
    given: dict[str, Any] = {"writer": f"writer-{run}", "token": token, "retention": Retention()}
    return RunOpening(stream, run, **(given | changes))


def batch(stream: str, seq: int, *data: bytes | str, run: str = "r1", **changes: Any) -> Append:
    events = [Event("delta", d.encode() if isinstance(d, str) else d) for d in data]
    given: dict[str, Any] = {"writer": f"writer-{run}", "events": events}
    return Append(stream, run, producer_seq=seq, **(given | changes))


async def everything(journal: Journal, stream: str) -> list[Frame]:
    frames: list[Frame] = []
    after = ORIGIN
    while True:
        page = await journal.read(stream, after, 1000, ROOMY)
        frames += page.frames
        if not page.more:
            return frames
        after = page.frames[-1].id


async def top(journal: Journal, stream: str) -> Cursor:
    return (await journal.describe(stream)).extent.top


def data(frames: Sequence[Frame]) -> list[bytes]:
    return [frame.data for frame in frames]


def seqs(page: Page) -> list[int]:
    return [frame.seq for frame in page.frames]


def said(frames: Sequence[Frame]) -> list[tuple[str, str]]:
    """Whose each frame is, and what it says: the type of a control frame, the text of any other."""
    return [
        (frame.run, json.loads(frame.data)["type"] if frame.is_control else frame.data.decode())
        for frame in frames
    ]


async def the_ending(journal: Journal, stream: str, run: str = "r1") -> tuple[str, str]:
    """Status and reason of a run; fails unless it has one terminal frame, its last, that says the same."""
    own = [frame for frame in await everything(journal, stream) if frame.run == run]
    assert [is_terminal(frame) for frame in own] == [False] * (len(own) - 1) + [True], said(own)
    info = await journal.run(stream, run)
    told = json.loads(own[-1].data)
    assert (told["status"], told["reason"], told["frames"]) == (info.status, info.reason, info.frames)
    assert (info.last, info.ended_ms) == (own[-1].id, own[-1].ms)
    return told["status"], told["reason"]


async def until(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask until the answer is not empty; what follows an ending, or a lease, comes in its own time."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            answer = await ask()
            if answer:
                return answer
            await asyncio.sleep(0.002)


async def list_ended(journal: Journal, since_ms: int, limit: int = 1000) -> list[EndedRun]:
    """Every run that ended after a time, page by page."""
    listed: list[EndedRun] = []
    while True:
        page = await journal.ended_runs(since_ms, listed[-1].place if listed else "", limit)
        listed += page
        if len(page) < limit:
            return listed
