"""The processes a benchmark starts and ends, and what the operating system says of them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import redis

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NCHAN_MODULES = tuple(
    Path(directory, "ngx_nchan_module.so")
    for directory in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/local/lib/nginx/modules")
)
DURABLE_STREAMS = "@durable-streams/server@0.3.7"

P = TypeVar("P", bound="Process")


class Missing(Exception):
    """A program that is not installed here; its rows are left out and a note says so."""


class Process:
    """A child process. Whatever it prints on stdout can be waited for; stderr goes to a file."""

    def __init__(self, name: str, command: list[str], directory: Path) -> None:
        self.name = name
        self._log = directory / f"{name}.log"
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._drain, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def _drain(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self, deadline_s: float = DEADLINE_S) -> str:
        """The next line it prints."""
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            line = None
        if line is None:
            raise RuntimeError(f"{self.name} says nothing:\n{self._log.read_text()[-4000:]}")
        return line

    def answer(self, deadline_s: float = DEADLINE_S) -> Any:
        """The next line it prints, which is JSON."""
        return json.loads(self.line(deadline_s))

    def ask(self, command: str, deadline_s: float = DEADLINE_S) -> Any:
        """Give it a line and read its answer."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(command + "\n")
        self._popen.stdin.flush()
        return self.answer(deadline_s)

    def cpu_s(self) -> float:
        """User and system time it has used, from the operating system, in steps of a clock tick."""
        return cpu_s(self.pid)

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def terminate(self) -> None:
        """Ask it to end."""
        self._popen.terminate()

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        self._popen.terminate()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(10)
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()


class Server(Process):
    """A process that listens. `url` is where."""

    url: str
    port: int

    def at(self, url: str) -> None:
        self.url = url
        self.port = int(url.rsplit(":", 1)[1].rstrip("/"))


class Worker(Server):
    """A server whose work is done by its one child process, which is what is measured."""

    @property
    def pid(self) -> int:
        (child,) = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text().split()
        return int(child)


class Lab:
    """Starts processes and ends them all when the benchmark is over."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[Process] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Lab]:
        with tempfile.TemporaryDirectory(prefix="relay-bench-") as directory:
            lab = cls(Path(directory))
            try:
                yield lab
            finally:
                for process in lab._processes:
                    process.terminate()
                for process in lab._processes:
                    process.stop()

    def program(self, module: str, *arguments: str) -> Process:
        """A program of this package."""
        return self._keep(
            Process(module.rpartition(".")[2], [sys.executable, "-m", module, *arguments], self._directory)
        )

    def stop(self, process: Process) -> None:
        """End one of them before the others."""
        self._processes.remove(process)
        process.stop()

    def redis(self) -> Server:
        """A redis-server that keeps nothing on disk."""
        binary = shutil.which("redis-server")
        if binary is None:
            raise Missing("redis-server is not installed")
        port = _free_port()
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self._directory)]
        server = self._keep(Server("redis", command, self._directory))
        server.at(f"redis://127.0.0.1:{port}")
        _await_port(port)
        return server

    def relay(self, journal: str, upstream: str, **settings: Any) -> Server:
        """relay with its default settings, but those given."""
        command = [sys.executable, "-m", "relay", "serve", "--port", "0", "--journal", journal]
        command += ["--upstream", upstream, "--drain-grace-s", "1"]
        for name, value in settings.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        server = self._keep(Server("relay", command, self._directory))
        server.at(_url_in(server.line()))
        return server

    def sqlite_url(self) -> str:
        """A journal file that nobody else uses."""
        return f"sqlite:///{tempfile.mkdtemp(dir=self._directory)}/relay.db"

    def upstream(self) -> Server:
        """The agent backend that makes all load."""
        return self._serving_program("benchmarks.load.upstream")

    def handwritten(self, upstream: str, redis_url: str) -> Server:
        """The usual hand-written way, as a peer. Raises `Missing`."""
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise Missing("httpx is not installed, which the hand-written peer needs") from None
        return self._serving_program("benchmarks.peers.handwritten", upstream, redis_url)

    def nginx(self, upstream: Server) -> Server:
        """nginx as a bare pass-through, one process. Raises `Missing`."""
        return self._nginx(Server, "nginx", UPSTREAM=f"127.0.0.1:{upstream.port}")

    def nchan(self) -> Server:
        """nginx with the nchan module, one worker. Raises `Missing`."""
        module = nchan_module()
        if module is None:
            raise Missing("nginx with nchan is not installed")
        # The worker may run as another user.
        self._directory.chmod(0o755)
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return self._nginx(Worker, "nchan", NCHAN=str(module), OPEN_FILES=str(open_files))

    def _nginx(self, kind: type[Server], peer: str, **values: str) -> Server:
        """nginx with the configuration of a peer, in which words in capitals stand for values."""
        binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise Missing("nginx is not installed")
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        directory.chmod(0o755)
        port = _free_port()
        text = (Path(__file__).parent / "peers" / f"{peer}.conf").read_text()
        values |= {"DIRECTORY": str(directory), "LISTEN": f"127.0.0.1:{port}"}
        for word, value in values.items():
            text = text.replace(word, value)
        config = directory / "nginx.conf"
        config.write_text(text)
        command = [binary, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(config)]
        server = self._keep(kind(peer, command, self._directory))
        server.at(f"http://127.0.0.1:{port}")
        _await_port(port)
        return server

    def durable_streams(self) -> Server:
        """The reference server of the Durable Streams protocol, in memory. Raises `Missing`."""
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            raise Missing("Node.js with npm is not installed, which the Durable Streams peer needs")
        name, _, version = DURABLE_STREAMS.rpartition("@")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = cache / "relay-benchmarks" / f"durable-streams-{version}"
        if not (directory / "node_modules" / name / "package.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            command = [npm, "install", "--prefix", str(directory), "--no-audit", "--no-fund", "--no-save"]
            command += ["--ignore-scripts", "--fetch-retries", "1", DURABLE_STREAMS]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                raise Missing(f"{DURABLE_STREAMS} could not be had from npm") from None
        script = Path(__file__).parent / "peers" / "durable_streams.cjs"
        server = self._keep(Server("durable-streams", [node, str(script), str(directory)], self._directory))
        server.at(_url_in(server.line()))
        return server

    def bare_loop(self, group_ms: float) -> Server:
        """The least that a fan-out in Python can be."""
        return self._serving_program("benchmarks.load.bare_loop", str(group_ms))

    def _serving_program(self, module: str, *arguments: str) -> Server:
        command = [sys.executable, "-m", module, *arguments]
        server = self._keep(Server(module.rpartition(".")[2], command, self._directory))
        server.at(_url_in(server.line()))
        return server

    def _keep(self, process: P) -> P:
        self._processes.append(process)
        return process


class Cpu:
    """CPU time of some processes since this was made."""

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self._processes = processes
        self._before = {name: process.cpu_s() for name, process in processes.items()}
        self._own_before = time.process_time()
        self._machine_before = machine_busy_s()

    def used_s(self) -> dict[str, float]:
        """Seconds of CPU by name; `others` is what everything else on the machine used, and what a hypervisor
        took."""
        busy = machine_busy_s() - self._machine_before - (time.process_time() - self._own_before)
        used = {name: process.cpu_s() - self._before[name] for name, process in self._processes.items()}
        return used | {"others": max(0.0, busy - sum(used.values()))}


def cpu_s(pid: int) -> float:
    """Seconds of CPU, user and system, that a process has used, in steps of a clock tick."""
    # The second field is the name in brackets and may hold anything; utime and stime are 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def machine_busy_s() -> float:
    """Seconds of CPU that the whole machine has used."""
    # proc(5): user nice system idle iowait irq softirq steal, in ticks
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


class Commands:
    """Commands a Redis server has run since this was made, those that scripts run included."""

    def __init__(self, server: Server) -> None:
        self._client = redis.Redis(port=server.port)
        self._before = self._calls()

    def _calls(self) -> dict[str, int]:
        stats: dict[str, Any] = self._client.info("commandstats")
        return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}

    def run(self) -> dict[str, int]:
        """Calls by command, our own left out."""
        after = self._calls()
        self._client.close()
        calls = {name: count - self._before.get(name, 0) for name, count in after.items() if name != "info"}
        return {name: count for name, count in calls.items() if count}


def nchan_module() -> Path | None:
    """Where nginx's module nchan is, if it is installed."""
    return next((path for path in NCHAN_MODULES if path.exists()), None)


def _url_in(line: str) -> str:
    found = re.search(r"http://[^\s)]+", line)
    if found is None:
        raise RuntimeError(f"no URL in {line!r}")
    return found[0]


def _free_port() -> int:
    # Below those that a system gives to whoever does not care, or somebody could have it before its server.
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _await_port(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
