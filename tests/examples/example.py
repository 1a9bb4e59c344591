"""An example as its README has it run: its own files, its own commands, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from held_port import hold_port
from relay_process import RelayProcess
from tcp_proxy import TcpProxy

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DEADLINE_S = 60

LEFT_BEHIND = ("__pycache__", ".*", "*.db*", "*.pem", "*.pid", "temporary", "node_modules")
"""What an example leaves in its folder when it is tried."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example:
    """A copy of an example's files. The ports its files and commands name are exchanged for others, which are
    its own until it is closed."""

    def __init__(self, name: str, directory: Path, *ports: int) -> None:
        self.directory = directory / name
        shutil.copytree(EXAMPLES / name, self.directory, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        self._held = {port: hold_port() for port in ports}
        self.ports = {port: int(holder.getsockname()[1]) for port, holder in self._held.items()}
        for file in filter(Path.is_file, self.directory.rglob("*")):
            file.write_text(re.sub(r"\b\d{4}\b", self._placed, file.read_text()))
        lines = "".join(self.blocks("")).replace("\\\n", " ").splitlines()
        self.commands = [line for line in lines if line]

    def close(self) -> None:
        """Its ports may be anybody's."""
        for holder in self._held.values():
            holder.close()

    def _placed(self, number: re.Match[str]) -> str:
        return str(self.ports.get(int(number[0]), number[0]))

    def blocks(self, language: str) -> list[str]:
        """The README's blocks of code in a language; commands are in none."""
        found = _BLOCK.findall((self.directory / "README.md").read_text())
        return [text for named, text in found if named == language]

    def command(self, words: str) -> str:
        """The README's one command that holds these words."""
        (found,) = (command for command in self.commands if words in command)
        return found

    def url(self, port: int, path: str = "") -> str:
        """An address as the README has it, here."""
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def shell(self, command: str, **environment: str) -> str:
        """What a command prints; it must succeed."""
        outcome = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=own_environment(environment),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert outcome.returncode == 0, (command, outcome.stdout, outcome.stderr)
        return outcome.stdout

    @contextlib.contextmanager
    def background(self, command: str) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on meanwhile, and what it prints."""
        process = subprocess.Popen(
            ["bash", "-c", "exec " + command.removesuffix("&")],
            cwd=self.directory,
            env=own_environment({}),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    @contextlib.contextmanager
    def server(
        self, words: str, port: int, *more: str, **environment: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The README's command with these words, and more arguments; once it listens, until it is stopped."""
        command = [*shlex.split(self.command(words).removesuffix("&")), *more]
        while "=" in command[0]:
            name, _, value = command.pop(0).partition("=")
            environment.setdefault(name, value)
        everything = own_environment(environment)
        command[0] = shutil.which(command[0], path=everything["PATH"]) or command[0]
        log = self.directory.parent / f"{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.directory, env=everything, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            try:
                await_listening(self.ports[port], process)
            except AssertionError as error:
                raise AssertionError(f"{error}:\n{log.read_text()}") from None
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"it did not stop on SIGTERM:\n{log.read_text()}") from None

    @contextlib.contextmanager
    def relay(self, journal: str = "", **settings: Any) -> Iterator[RelayProcess]:
        """relay with the settings of the README's command, and with its journal, unless told another."""
        flags = iter(shlex.split(self.command("relay serve"))[2:])
        given: dict[str, Any] = {}
        for flag in flags:
            name = flag.removeprefix("--").replace("-", "_")
            if name == "webhook_allow_private":
                given[name] = True
            elif name == "stream_from":
                given.setdefault(name, []).append(next(flags))
            else:
                given[name] = next(flags)
        journal = journal or f"sqlite:///{self.directory / 'relay.db'}"
        with RelayProcess.start(**(given | settings), journal=journal) as process:
            yield process


def own_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with the programs that are installed beside this Python."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return os.environ | {"PATH": programs, "PYTHONUNBUFFERED": "1", **more}


class Interlude:
    """Stands before a backend. An answer that passes it while it is `holding` waits behind so many of its
    events, so that it is not over before something was done to it."""

    def __init__(self, port: int, event: bytes) -> None:
        self._event = event
        self._most = 0
        self._passed = 0
        self._rest = b""
        self._free = threading.Event()
        self.proxy = TcpProxy(port, to_client=self._pass)
        self.proxy.read_max = 64  # no more than an event, however many have come

    def _pass(self, data: bytes) -> bytes:
        seen = self._rest + data
        self._rest = seen[1 - len(self._event) :]
        if self._event in seen:
            self._passed += 1
            if self._passed > self._most:
                self._free.wait(DEADLINE_S)
        return data

    @contextlib.contextmanager
    def holding(self, events: int) -> Iterator[None]:
        """Hold the one answer that is given meanwhile, until the end of the block."""
        self._passed, self._most, self._rest = 0, events, b""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    @classmethod
    @contextlib.contextmanager
    def before(cls, port: int, event: bytes) -> Iterator[Interlude]:
        interlude = cls(port, event)
        interlude._free.set()
        try:
            yield interlude
        finally:
            interlude._free.set()
            interlude.proxy.close()


def await_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody takes connections at a port."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens on port {port}, exit code {process.poll()}")


def posted(command: str) -> Any:
    """What the POST answers that a curl command makes, without the time that it takes to start curl."""
    (url,) = re.findall(r"curl -X POST (\S+)", command)
    with urllib.request.urlopen(url, b"", timeout=DEADLINE_S) as answer:
        return json.loads(answer.read())


def whole_events(said: str) -> str:
    """What curl printed of an answer, without an event that it had only a part of when it was cut."""
    return said.rpartition("\n\n")[0] + "\n\n"


def body_of(url: str) -> bytes:
    """What a GET answers."""
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        body: bytes = answer.read()
        return body


def once(is_so: Callable[[], Any]) -> Any:
    """What a question answers as soon as the answer is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"it never became so: {answer!r}"
        time.sleep(0.02)
    return answer
