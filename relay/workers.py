"""Several workers on one port: the parent that starts and watches them, and what a worker knows of it.

The parent serves nothing. It reserves the port, runs its own command again once for each worker, and starts
again what dies. A worker learns its place from one environment variable; by a pipe it says once that it
serves, or why it cannot; its standard input ends when the parent is gone.

Every worker listens on a socket of its own (SO_REUSEPORT), to which the kernel deals connections by a hash of
their addresses. Connections here live long, so that where they begin is where the load stays. With one socket
inherited by all, whoever wakes first takes whatever waits: of 200 connections 4 workers got 118, 36, 27 and
19, or 117, 58, 23 and 2 when they came at once; with sockets of their own 64, 49, 44, 43 and 55, 51, 50, 44.
A worker that is dead, or not ready yet, is dealt none, since its socket is closed, or does not listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from subprocess import PIPE, Popen
from typing import IO

import orjson

from relay.errors import StartupError
from relay.metrics import forget_gauges
from relay.settings import Settings

log = logging.getLogger("relay.workers")

RESTART_PAUSE_S = 0.25
RESTART_PAUSE_MAX_S = 30.0
"""Pause before a worker that died is started again; it doubles for those that do not live long."""

STEADY_S = 60.0
"""A worker that served for so long did not die of how it was started."""

CLOSING_S = 10.0
"""Time that a worker gets for closing what is open, beyond what its settings let it wait for."""

_PLACE = "_RELAY_WORKER_PLACE"
_STDIN = 0


@dataclass(frozen=True)
class Worker:
    """A worker's place among the workers of its port, as its parent gave it.

    `number` counts from 1 to `count` and stays when the process is replaced. `directory` is what only the
    workers of this port share. `listener` and `parent` are descriptors: of a bound socket and of the pipe."""

    number: int
    count: int
    directory: str
    listener: int
    parent: int

    @classmethod
    def of_this_process(cls) -> Worker | None:
        """This process's place, taken out of its environment; None where no parent of ours started it."""
        place = os.environ.pop(_PLACE, None)
        return None if place is None else cls(**orjson.loads(place))

    def socket(self) -> socket.socket:
        """What to listen on; nobody can connect before."""
        return socket.socket(fileno=self.listener)

    def say_ready(self) -> None:
        """Tell the parent that this worker serves."""
        self._say({})

    def say_failed(self, why: str) -> None:
        """Tell the parent what keeps this worker from serving."""
        self._say({"failed": why})

    def _say(self, words: dict[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.parent, orjson.dumps(words) + b"\n")

    def when_orphaned(self, drain: Callable[[], None]) -> None:
        """Call `drain` once when the parent is gone, also if it is already. Nobody starts this worker again
        then or tells it to end, and another relay may want the port."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(_STDIN)
            log.warning("worker %d lost its parent, and drains", self.number)
            # What the parent would do at its end. Who still has files there keeps them open.
            shutil.rmtree(self.directory, ignore_errors=True)
            drain()

        loop.add_reader(_STDIN, gone)


class Supervisor:
    """The parent of `--workers`. `reserved` is bound to the address they are to listen on and never listens
    itself; it keeps others out, because it does not share its port."""

    def __init__(self, settings: Settings, reserved: socket.socket) -> None:
        self._count = settings.workers
        self._reserved = reserved
        # As `App.drain` and `App.close` may wait for the journal: for openings, for endings, for the lease.
        self._grace_s = settings.drain_grace_s + 3 * settings.journal_timeout_s + CLOSING_S
        self._processes: dict[int, Popen[bytes]] = {}
        self._serving: set[int] = set()
        self._all_served = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failure: StartupError | None = None

    async def run(self, announce: Callable[[], None]) -> bool:
        """Have workers until SIGTERM or SIGINT; then end with the last of them. `announce` is called once,
        when all serve.

        Returns whether all ended by themselves and in order. Raises `StartupError` when one does not come to
        serve in the first place; the others are ended then."""
        loop = asyncio.get_running_loop()
        for told in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(told, self._stop, told)
        with _private_directory() as directory:
            lives = [asyncio.create_task(self._keep(n + 1, directory)) for n in range(self._count)]
            for life in lives:
                life.add_done_callback(self._one_is_over)
            announcing = asyncio.create_task(self._announce(announce))
            await self._stopping.wait()
            announcing.cancel()
            await asyncio.wait(lives, timeout=self._grace_s)
            for number, process in self._processes.items():
                log.error("worker %d did not end within %g s, and is killed", number, self._grace_s)
                process.kill()
            in_order = await asyncio.gather(*lives)
        if self._failure is not None:
            raise self._failure
        return all(in_order)

    async def _announce(self, announce: Callable[[], None]) -> None:
        await self._all_served.wait()
        announce()

    def _one_is_over(self, life: asyncio.Task[bool]) -> None:
        if not self._stopping.is_set():
            self._stop(signal.SIGTERM)

    def _stop(self, told: signal.Signals) -> None:
        """Tell every worker, and the same again: a second SIGINT has its own meaning to them."""
        self._stopping.set()
        for number, process in self._processes.items():
            # Before it serves a worker has no handlers, and Python's own one for SIGINT is noisy.
            process.send_signal(told if number in self._serving else signal.SIGTERM)

    async def _keep(self, number: int, directory: str) -> bool:
        """Have a worker of this number until told to stop; whether the last one ended in order."""
        loop = asyncio.get_running_loop()
        pause_s = RESTART_PAUSE_S
        while not self._stopping.is_set():
            began = loop.time()
            try:
                why, in_order = await self._live(number, directory)
            except OSError as error:
                why, in_order = f"A worker could not be started: {error}", False
            if self._stopping.is_set():
                if not in_order:
                    log.error("worker %d did not end in order: %s", number, why)
                return in_order
            if not self._all_served.is_set():
                self._failure = StartupError(why)
                return False
            if loop.time() - began >= STEADY_S:
                pause_s = RESTART_PAUSE_S
            log.error("worker %d is gone, and started again in %g s: %s", number, pause_s, why)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(2 * pause_s, RESTART_PAUSE_MAX_S)
        return True

    async def _live(self, number: int, directory: str) -> tuple[str, bool]:
        """One process from its start to its end: what it died of, and whether it ended as if told to."""
        process, pipe = self._start(number, directory)
        self._processes[number] = process
        with process:
            failure = await self._hear(number, pipe)
            # The pipe was closed by its end, so that this does not wait. Nobody else waits for it either, as
            # asyncio's own watchers would: a signal is never sent to who has its number next.
            code = process.wait()
        del self._processes[number]
        self._serving.discard(number)
        forget_gauges(directory, number)
        ended = f"exit code {code}" if code >= 0 else f"signal {-code}"
        # Before it has handlers, and when Python has taken them away at its end, a signal ends it so.
        in_order = code in (0, -signal.SIGTERM, -signal.SIGINT)
        return failure or f"A worker ended with {ended}.", in_order

    def _start(self, number: int, directory: str) -> tuple[Popen[bytes], IO[bytes]]:
        """The process, and what it says to its parent. Raises `OSError`."""
        with contextlib.ExitStack() as if_it_fails:
            heard, said = os.pipe()
            pipe = if_it_fails.enter_context(os.fdopen(heard, "rb"))
            with os.fdopen(said, "wb"), socket.socket(self._reserved.family, socket.SOCK_STREAM) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(self._reserved.getsockname())
                place = Worker(number, self._count, directory, listener.fileno(), said)
                # The same command and not a fork: a worker's name, and all else that must be random, is made
                # in it. In a process group of its own, because a terminal sends Ctrl-C to all of one, and
                # the parent passes it on.
                process = Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    stdin=PIPE,
                    pass_fds=(place.listener, place.parent),
                    process_group=0,
                    env=os.environ | {_PLACE: orjson.dumps(place).decode()},
                )
            if_it_fails.pop_all()
        return process, pipe

    async def _hear(self, number: int, pipe: IO[bytes]) -> str:
        """Take in what a worker says, until it is gone; why it does not serve, or ""."""
        said = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), pipe)
        failure = ""
        async for line in said:
            failure = orjson.loads(line).get("failed", "")
            if not failure:
                self._serving.add(number)
                if len(self._serving) == self._count:
                    self._all_served.set()
        return failure


@contextlib.contextmanager
def _private_directory() -> Iterator[str]:
    try:
        directory = tempfile.mkdtemp(prefix="relay-")
    except OSError as error:
        raise StartupError(f"Several workers need a directory for temporary files: {error}") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
