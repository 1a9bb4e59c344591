"""A real redis-server of a test's own: on a free port, in a temporary directory, never anybody else's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import redis
from held_port import hold_port

READY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0


PORT_MAX = 55_535
"""The bus of a cluster is 10,000 above."""


class RedisServer:
    """One redis-server process. Extra `--option value` arguments override the default of no persistence."""

    def __init__(self, binary: str, extra_args: tuple[str, ...]) -> None:
        self._binary = binary
        self._directory = Path(tempfile.mkdtemp(prefix="relay-redis-"))
        self._extra_args = extra_args
        self._holder = hold_port(PORT_MAX)
        self.port: int = self._holder.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, *extra_args: str) -> Self:
        binary = shutil.which("redis-server")
        if binary is None:
            raise AssertionError("These tests need a real Redis: install redis-server 6.2 or newer.")
        server = cls(binary, extra_args)
        try:
            server._launch()
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def url(self, db: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{db}"

    def client(self, db: int = 0) -> redis.Redis:
        """A synchronous client; close it, or use it as a context manager."""
        return redis.Redis(host="127.0.0.1", port=self.port, db=db, socket_timeout=30)

    def pause(self) -> None:
        """Stop the process where it stands: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it may have been in the midst

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def replicate(self, primary: RedisServer) -> None:
        """Become a replica, and wait until in sync."""
        with self.client() as client:
            client.replicaof("127.0.0.1", str(primary.port))
            _until(lambda: client.info("replication").get("master_link_status") == "up", "replica is in sync")

    def promote(self) -> None:
        """Be a primary with what was replicated so far."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def stop(self) -> None:
        """Shut down and remove what it kept."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # a paused process would not see the next one
            self._end(signal.SIGTERM)
        self._holder.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Die at once, keeping the directory for `restart`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Run again on the same port and directory."""
        if self._process is not None:
            self._end(signal.SIGTERM)
        self._launch()

    def _launch(self) -> None:
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        self._await_ready()

    def _command(self) -> list[str]:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._directory), "--logfile", str(self._directory / "redis.log")]
        command += ["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"]
        return [*command, *self._extra_args]

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_DEADLINE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5) as client:
                    client.ping()
                    return
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                return  # it answers; who may speak to it is the test's business
            except redis.ResponseError as error:
                if not str(error).startswith("LOADING"):
                    return
            except redis.RedisError:
                pass
            time.sleep(0.01)
        log = self._directory / "redis.log"
        raise RuntimeError(f"redis-server did not start:\n{log.read_text() if log.exists() else ''}")

    def _end(self, with_signal: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(with_signal)
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_DEADLINE_S)
        self._process = None


_SENTINEL_OPTIONS = {"down-after-milliseconds": 60_000, "failover-timeout": 3000}


class RedisSentinel(RedisServer):
    """A sentinel that alone watches a primary, as service `main`. It does not fail over until it is told to
    suspect it: a primary may be silent because the machine is busy."""

    @classmethod
    def watching(cls, primary: RedisServer, *, replicas: int) -> Self:
        """Start one, and wait until it knows so many replicas."""
        sentinel = cls.start(
            f"sentinel monitor main 127.0.0.1 {primary.port} 1",
            *(f"sentinel {option} main {value}" for option, value in _SENTINEL_OPTIONS.items()),
        )
        with sentinel.client() as client:
            _until(
                lambda: _healthy(client.sentinel_slaves("main")) == replicas, "the sentinel knows replicas"
            )
        return sentinel

    def suspect(self) -> None:
        """Take a primary for dead that was silent for half a second, from now on."""
        with self.client() as client:
            client.sentinel_set("main", "down-after-milliseconds", 500)

    def await_primary(self, server: RedisServer) -> None:
        """Suspect the former one; wait until it says that this one is the primary, and this one knows."""
        self.suspect()
        with self.client() as client, server.client() as primary:
            _until(
                lambda: (
                    client.sentinel_get_master_addr_by_name("main")[1] == server.port
                    and primary.role()[0] == b"master"
                ),
                "the sentinel promotes the replica",
            )

    def look_again(self, primary: RedisServer, *, replicas: int) -> None:
        """Forget former failovers, and wait until the primary is this one, with so many replicas."""
        with self.client() as client:
            # Before it has taken the new primary for its own, it would begin again at the former one.
            _until(lambda: client.sentinel_master("main")["port"] == primary.port, "the failover is over")
            # Monitoring begins anew: after a reset it would ask for replicas ten seconds later.
            client.sentinel_remove("main")
            client.sentinel_monitor("main", "127.0.0.1", primary.port, 1)
            for option, value in _SENTINEL_OPTIONS.items():
                client.sentinel_set("main", option, value)
            _until(
                lambda: _healthy(client.sentinel_slaves("main")) == replicas, "the sentinel knows replicas"
            )

    def _command(self) -> list[str]:
        config = self._directory / "sentinel.conf"  # it keeps there what it learns
        if not config.exists():
            config.write_text("\n".join(self._extra_args))
        command = [self._binary, str(config), "--sentinel", "--port", str(self.port), "--bind", "127.0.0.1"]
        return [*command, "--dir", str(self._directory), "--logfile", str(self._directory / "redis.log")]


def _healthy(replicas: list[dict[str, object]]) -> int:
    return sum(replica["flags"] == "slave" for replica in replicas)


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)
