"""The one process of a SQLite journal dies and is started again on the same file: one scene a fault."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

from faults.agent import CHAT
from faults.listener import all_of
from faults.pair import LEASE_S, followed, fresh_sessions, run_of
from faults.pusher import Pusher
from faults.tally import Tally, kept_of, shown_to
from held_port import hold_port
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

RESTARTED = "killed and restarted on its file"


class Lone:
    """A relay on a file of its own, that can be killed and started again on the same port."""

    def __init__(self, path: Path, upstream: ScriptedUpstream, **settings: Any) -> None:
        self.upstream = upstream
        self._journal = f"sqlite:///{path}"
        self._settings = {"owner_lease_s": LEASE_S} | settings
        self._reserved = hold_port()
        self.relay = self._start(self._reserved.getsockname()[1])

    def _start(self, port: int) -> RelayProcess:
        return RelayProcess.start(
            journal=self._journal, upstream=self.upstream.url, port=port, **self._settings
        )

    async def restart(self) -> None:
        self.relay = await asyncio.to_thread(self._start, self.relay.port)

    def __enter__(self) -> Lone:
        return self

    def __exit__(self, *exc: object) -> None:
        self.relay.kill()
        self._reserved.close()


async def restarted(lone: Lone, rng: Random, tally: Tally, runs: int = 4) -> None:
    """kill -9 at a random frame: when it is back, what it read of upstream has ended, and what is pushed
    goes on."""
    async with fresh_sessions() as sessions:
        turns = [
            await followed(sessions, lone.upstream, lone.relay, lone.relay, dialect=("raw", CHAT)[n % 2])
            for n in range(runs)
        ]
        pusher = Pusher(sessions, (lone.relay.url,), 0, idle_timeout_s=300)
        await pusher.open()
        pushing = asyncio.create_task(pusher.push())
        await pusher.has(rng.randint(1, 5))
        await turns[0].client.has(rng.randint(1, 40))
        lone.relay.kill()
        tally.inject(RESTARTED)
        for turn in turns:
            await turn.turn.await_over()
            assert turn.turn.closed
        for turn in turns:
            await all_of([turn.answer, turn.reading])
            assert turn.client.whole is turn.reader.whole is False
        accepted = pusher.accepted
        await lone.restart()
        for turn in turns:
            found = await run_of(
                sessions, lone.relay, turn.stream, turn.run
            )  # at start-up, not a lease later
            assert (found["status"], found["reason"]) == ("lost", "owner_lost")
        await pusher.has(accepted + 2)
        pusher.finish()
        await pushing
        for turn in turns:
            await turn.reader.listen()
            await turn.client.listen()
            kept = await turn.kept(lone.relay)
            assert turn.count(tally, RESTARTED, kept) == "owner_lost"
            assert [end["reason"] for end in turn.reader.endings()] == ["owner_lost"]
            assert turn.client.data == [frame.data for frame in kept if frame.event != "relay"]
            assert len(shown_to(turn.reader)) == len(kept)
        kept = await kept_of(sessions, lone.relay, pusher.stream)
        assert tally.count(RESTARTED, kept, pusher.said) == "producer_end"
