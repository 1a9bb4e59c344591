"""The README's walk: one answer through the proxy, cut, resumed, replayed."""

from __future__ import annotations

from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream


def test_an_answer_cut_in_the_middle_is_resumed_with_nothing_twice_and_nothing_missing(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    words = [f"word-{n}" for n in range(20)]
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for n, word in enumerate(words):
            if n == 7:
                await gate.wait()
            await exchange.chunk(f"data: {word}\n\n".encode())
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}") as first:
        seen = first.take(7)
    gate.open()
    with Reading(f"{relay.url}/{name}", Last_Event_ID=seen[-1].id) as second:
        rest = second.frames()
        last = second.last_id
    assert [block.data for block in seen + rest] == words
    with Reading(f"{relay.url}/{name}", Last_Event_ID=last) as third:
        assert third.status == 204
    assert upstream.calls(f"/{name}") == 1
