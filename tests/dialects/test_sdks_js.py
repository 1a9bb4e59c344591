"""Unmodified JavaScript SDKs that read from relay: a whole answer passes, and one that broke off raises."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from recorded_answers import AG_UI, AI_SDK, Answer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

ASK = Path(__file__).resolve().parent.parent / "js" / "ask_agent.mjs"

DEADLINE_S = 300


def ask(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    answer: Answer,
    events: list[bytes],
) -> dict[str, Any]:
    """What the SDK made of such an answer."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}", *answer.headers)
        for event in events:
            await exchange.chunk(event)
        await exchange.end()

    upstream.on(f"/{name}{answer.path}", handler)
    url = f"{relay.url}/{name}{answer.path}"
    outcome = subprocess.run(
        ["node", ASK, answer.dialect, url],
        timeout=DEADLINE_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout
    said: dict[str, Any] = json.loads(outcome.stdout)
    return said


pytestmark = pytest.mark.usefixtures("node_packages")
each_answer = pytest.mark.parametrize("answer", [AI_SDK, AG_UI], ids=lambda answer: answer.dialect)


@each_answer
def test_a_whole_answer_passes(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(relay, upstream, name, answer, answer.events)
    assert said == {"text": "Hello", "error": None}
    assert whole_run(relay, name).outcome == ("completed", "upstream_end")


@each_answer
def test_an_answer_that_broke_off_is_an_error(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(relay, upstream, name, answer, answer.events[: answer.shown])
    assert said == {"text": "Hel", "error": "Upstream ended without its terminal marker."}


@each_answer
def test_upstreams_own_error_is_one(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(relay, upstream, name, answer, [*answer.events[: answer.shown], answer.error])
    assert said == {"text": "Hel", "error": "boom"}
