"""Two relays on one Redis, an agent behind them that is not always well, and clients that come, are cut, go
on elsewhere, stop, send twice and ask for what is not theirs; and a Prometheus that watches."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

from deploy.prometheus_process import Prometheus

KEY = "an-admin-key-of-this-test"
WORDS = 20
DEADLINE_S = 60


class Answer(NamedTuple):
    status: int
    json: Any


class Scene:
    """What there is, and what clients do with it. Everything is asked of a relay by number."""

    def __init__(
        self,
        redis: RedisServer,
        relays: list[RelayProcess],
        upstream: ScriptedUpstream,
        prometheus: Prometheus,
    ) -> None:
        self.redis = redis
        self.relays = relays
        self.upstream = upstream
        self.prometheus = prometheus

    @classmethod
    @contextlib.contextmanager
    def open(cls, program: str, directory: Path) -> Iterator[Scene]:
        """Everything started; `program` is Prometheus."""
        with contextlib.ExitStack() as open_:
            redis = RedisServer.start("--maxmemory", "64mb", "--maxmemory-policy", "noeviction")
            open_.callback(redis.stop)
            upstream = open_.enter_context(ScriptedUpstream.running())
            script(upstream)
            settings: dict[str, Any] = {
                "journal": redis.url(), "upstream": upstream.url,
                "admin_key": KEY, "admin_addr": "127.0.0.1:0",
                "journal_timeout_s": 0.8, "owner_lease_s": 5.0, "drain_grace_s": 1,
                "webhook_url": f"{upstream.url}/receiver", "webhook_secret": "whsec_" + "c2VjcmV0" * 4,
                "webhook_allow_private": True,
            }  # fmt: skip
            relays = []
            for _ in range(2):
                relays.append(RelayProcess.start(**settings))
                open_.callback(relays[-1].stop)
            told = [relay.logged_line("administration is on") for relay in relays]
            targets = [line.rpartition("http://")[2] for line in told]
            prometheus = open_.enter_context(Prometheus.running(program, directory, KEY, targets))
            yield cls(redis, relays, upstream, prometheus)

    def ask(self, relay: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request to relay's own routes, with the key unless told otherwise; made again while relay says
        that it cannot be answered just now."""
        deadline = time.monotonic() + DEADLINE_S
        while (answer := self._ask(relay, method, path, body, headers)).status == 503:
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)
        return answer

    def _ask(self, relay: int, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        names = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.relays[relay].port, timeout=DEADLINE_S)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, f"/relay/v1/streams/{path}", sent, names)
            response = connection.getresponse()
            said = response.read()
            return Answer(response.status, json.loads(said) if said else None)
        finally:
            connection.close()

    def reading(self, relay: int, path: str, **headers: str) -> Reading:
        """An answer that is read; asked for as `ask` does."""
        deadline = time.monotonic() + DEADLINE_S
        while (reading := Reading(self.relays[relay].url + path, **headers)).status == 503:
            reading.cut()
            assert time.monotonic() < deadline, "relay serves no readers"
            time.sleep(0.05)
        return reading

    # What clients do

    def cut_and_resume(self) -> None:
        """Half an answer here, and the rest there."""
        with self.reading(0, "/answer") as reading:
            cursor = reading.take(WORDS // 2)[-1].id
        with self.reading(1, "/answer", Last_Event_ID=cursor) as reading:
            assert len(reading.frames()) == WORDS - WORDS // 2

    def stop_from_elsewhere(self) -> None:
        """An answer without end, cancelled."""
        with self.reading(0, "/endless") as reading:
            reading.take(5)
            assert self.ask(1, "POST", f"{reading.headers['relay-stream']}/cancel").status == 200

    def push(self, stream: str) -> str:
        """A run of a producer that sends everything twice, and goes on too late; its name."""
        opened = self.ask(0, "POST", f"{stream}/runs", {}).json
        path, writer = f"{stream}/runs/{opened['run']}/frames", {"Relay_Writer": opened["writer"]}
        for number in (1, 1, 11):
            frames = [{"data": f"word {number + place}"} for place in range(10)]
            assert self.ask(0, "POST", path, frames, Relay_Seq=str(number), **writer).status == 200
        assert self.ask(0, "POST", f"{path}?end=completed", [], **writer).status == 200
        assert self.ask(0, "POST", path, [{"data": "late"}], **writer).status == 409
        return str(opened["run"])

    def push_and_read(self) -> None:
        """A pushed run, read elsewhere."""
        events = f"/relay/v1/streams/conversation/events?run={self.push('conversation')}"
        with self.reading(1, events, Authorization=f"Bearer {KEY}") as reading:
            assert len(reading.frames()) == 20

    def be_refused(self) -> None:
        """What is not there, and what is not theirs."""
        assert self.ask(0, "GET", "nothing").status == 404
        assert self.ask(1, "GET", "nothing", Authorization="Bearer of-somebody-else").status == 401

    def fail(self) -> None:
        """An answer that breaks off."""
        with self.reading(0, "/broken") as reading, contextlib.suppress(http.client.HTTPException, OSError):
            reading.frames()

    def say_nothing(self) -> None:
        """An answer that is whole, and empty."""
        with self.reading(0, "/empty") as reading:
            reading.frames()

    def resume_after_a_gap(self, stream: str) -> None:
        """A cursor whose frames are not kept any more."""
        with self.reading(
            1, f"/relay/v1/streams/{stream}/events?control=none",
            Authorization=f"Bearer {KEY}", Last_Event_ID="1-1",
        ) as reading:  # fmt: skip
            assert reading.status == 410

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """All of that over and over meanwhile. What fails in it, fails the block."""
        over = threading.Event()
        failed: list[BaseException] = []

        def repeat(act: Callable[[], None], pause_s: float) -> None:
            try:
                while not over.wait(pause_s):
                    act()
            except BaseException as error:
                failed.append(error)

        acts: list[tuple[Callable[[], None], float]] = [
            (self.cut_and_resume, 0.01), (self.cut_and_resume, 0.01), (self.stop_from_elsewhere, 0.3),
            (self.push_and_read, 0.2), (self.be_refused, 1.0), (self.fail, 2.0),
            (self.say_nothing, 1.0),
        ]  # fmt: skip
        threads = [threading.Thread(target=repeat, args=act, daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(DEADLINE_S)
            assert not failed, failed


def script(upstream: ScriptedUpstream) -> None:
    """What the agent says, and who takes the transcripts."""

    async def words(exchange: Exchange, count: int) -> None:
        await exchange.head()
        for number in range(count):
            await exchange.chunk(b'data: {"text": "word %d "}\n\n' % number)
            await asyncio.sleep(0.02)

    async def answer(exchange: Exchange) -> None:
        await words(exchange, WORDS)
        await exchange.end()

    async def endless(exchange: Exchange) -> None:
        await words(exchange, 10_000)

    async def broken(exchange: Exchange) -> None:
        await words(exchange, 2)
        exchange.writer.close()

    async def empty(exchange: Exchange) -> None:
        await exchange.stream([])

    async def receiver(exchange: Exchange) -> None:
        await exchange.answer("204 No Content", b"")

    for path, handler in {
        "/answer": answer, "/endless": endless, "/broken": broken, "/empty": empty, "/receiver": receiver
    }.items():  # fmt: skip
        upstream.on(path, handler)
