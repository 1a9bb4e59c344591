"""The people of the scenarios: an agent that speaks when told to, and tabs that look on."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Sequence
from typing import Any

from producing import ask
from reading import Block, Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream


def chunk_of(text: str) -> bytes:
    """A chat completion chunk, as an event."""
    payload = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return f"data: {json.dumps(payload)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def agent(upstream: ScriptedUpstream, path: str, said: Iterable[bytes], then: Sequence[bytes] = ()) -> Gate:
    """An agent that sends `said`, waits at the gate, sends `then` and ends its answer."""
    gate, first = upstream.gate(), list(said)

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for data in first:
            await exchange.chunk(data)
        await gate.wait()
        for data in then:
            await exchange.chunk(data)
        await exchange.end()

    upstream.on(path, handler)
    return gate


def events_of(relay: RelayProcess | str, stream: str, query: str = "", **headers: str) -> Reading:
    """A tab that reads a stream."""
    url = relay if isinstance(relay, str) else relay.url
    return Reading(f"{url}/relay/v1/streams/{stream}/events?wait=60&{query}", **headers)


def rest_of(reading: Reading) -> list[Block]:
    """What still comes, up to the end of the answer, which may be a broken one."""
    blocks: list[Block] = []
    try:
        while True:
            blocks += reading.take(1)
    except (StopIteration, RuntimeError, http.client.HTTPException, ConnectionError):
        return blocks


def until(reading: Reading, kind: str, **members: Any) -> list[Block]:
    """What comes up to and with a control frame of that kind and with these members."""
    blocks: list[Block] = []
    while True:
        blocks += reading.take(1)
        control = blocks[-1].control
        if control is not None and control["type"] == kind and members.items() <= control.items():
            return blocks


def kinds(blocks: Iterable[Block]) -> list[str]:
    """What a tab saw in the journal, in order: data as it is, control frames as `type:run`."""
    seen = []
    for block in blocks:
        control = block.control
        if control is None:
            seen.append(block.data)
        elif "run" in control:
            seen.append(f"{control['type']}:{control['run']}")
    return seen


def text_of(dialect: str, blocks: Iterable[Block]) -> str:
    """The text that a client shows of frames."""
    text = ""
    for block in blocks:
        if block.event == "relay":
            continue
        if dialect != "openai-chat":
            text += block.data
        elif block.data != "[DONE]":
            for choice in json.loads(block.data).get("choices", ()):
                text += choice["delta"]["content"]
    return text


def transcript(relay: RelayProcess, stream: str, run: str) -> Any:
    return relay.json(f"/relay/v1/streams/{stream}/runs/{run}/transcript")


def seqs(blocks: Iterable[Block]) -> list[int]:
    """The seqs of what was journaled, data and control frames."""
    own = ("hello", "live", "bye", "gap", "reset", "heartbeat")
    return [
        int(block.id.rpartition(".")[2].partition("-")[0])
        for block in blocks
        if block.control is None or block.control["type"] not in own
    ]


def cancel(relay: RelayProcess, stream: str, run: str = "") -> Any:
    """Stop a run, or the current one; what it ended as."""
    path = f"{stream}/runs/{run}/cancel" if run else f"{stream}/cancel"
    answer = ask(relay.port, "POST", path)
    assert answer.status == 200, answer
    return answer.json
