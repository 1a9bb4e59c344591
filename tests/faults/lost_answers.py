"""A producer behind something that loses every third answer, while the relay it talks to is killed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import secrets
import threading
from collections.abc import Callable
from random import Random

from faults.pair import Pair, fresh_sessions
from faults.tally import Tally, kept_of
from producing import Answer, ask
from tcp_proxy import TcpProxy

LOST_ANSWERS = "every third answer lost, relay killed"

TRIES_MOST = 200


class LossyWay:
    """The way to two relays, one at a time, on which every third answer is lost."""

    def __init__(self, pair: Pair, proxy: TcpProxy) -> None:
        self._ports = [pair.owner.port, pair.other.port]
        self._proxy = proxy
        self.retries = 0

    def insist(self, ask_once: Callable[[int], Answer]) -> Answer:
        """Ask until there is an answer, each time at the other relay."""
        for _ in range(TRIES_MOST):
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = ask_once(self._proxy.port)
                if answer.status != 503:
                    return answer
            self.retries += 1
            self._ports.reverse()
            self._proxy.lead_to(self._ports[0])
        raise AssertionError("no answer")


async def producer_retries(pair: Pair, rng: Random, tally: Tally, batches: int = 24) -> None:
    """kill -9 of the relay in the midst of a batch; the same writer and numbers go on at the other one, to
    the end, whose answer is lost too."""
    stream = f"s-{secrets.token_hex(6)}"
    said: list[str] = []
    killed_in = rng.randint(2, batches - 3)

    def produce(proxy: TcpProxy) -> None:
        way = LossyWay(pair, proxy)
        key = secrets.token_hex(8)
        opened = way.insist(lambda port: ask(port, "POST", f"{stream}/runs", {}, Idempotency_Key=key))
        run, writer = opened.json["run"], opened.json["writer"]
        for batch in range(batches):
            last = batch == batches - 1
            if batch == killed_in:
                loop.call_soon_threadsafe(kill.set)
            if batch == killed_in + 2:
                killed.wait()
            while last and proxy.connections % 3 != 2:
                way.insist(lambda port: heartbeat(port, run, writer))
            seq = len(said) + 1
            words = [f"frame-{batch}-{n}" for n in range(rng.randint(1, 4))]
            said.extend(words)
            retries = way.retries

            def push(port: int, words: list[str] = words, seq: int = seq, last: bool = last) -> Answer:
                path = f"{stream}/runs/{run}/frames" + ("?end=completed" if last else "")
                body = [{"data": word} for word in words]
                return ask(port, "POST", path, body, Relay_Writer=writer, Relay_Seq=str(seq))

            done = way.insist(push)
            assert done.status == 200, done
            assert done.json["appended"] + done.json["duplicates"] == len(words)
            assert done.json["next_seq"] == len(said) + 1
            assert not last or (way.retries > retries and done.json["duplicates"] == len(words))
        assert (done.json["status"], done.json["reason"]) == ("completed", "producer_end")

    def heartbeat(port: int, run: str, writer: str) -> Answer:
        return ask(port, "POST", f"{stream}/runs/{run}/heartbeat", Relay_Writer=writer)

    loop = asyncio.get_running_loop()
    kill, killed = asyncio.Event(), threading.Event()
    # One byte passes, so the request was answered: what is lost is only the answer.
    with TcpProxy.running(pair.owner.port, plan=lambda number: 1 if number % 3 == 2 else None) as proxy:
        producing = asyncio.create_task(asyncio.to_thread(produce, proxy))
        killing = asyncio.create_task(kill.wait())
        await asyncio.wait([producing, killing], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(rng.uniform(0, 0.005))
        pair.owner.kill()
        killed.set()
        tally.inject(LOST_ANSWERS)
        replaced = asyncio.create_task(pair.replace_owner())
        await producing
        await replaced
    async with fresh_sessions() as sessions:
        for relay in (pair.owner, pair.other):
            kept = await kept_of(sessions, relay, stream)
            assert [frame.data for frame in kept if frame.event != "relay"] == said
        assert tally.count(LOST_ANSWERS, kept, said) == "producer_end"
