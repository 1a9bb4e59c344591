"""A real relay in a process of its own, as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_DEADLINE_S = 60


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait for what a relay does a moment after it was seen to do something else."""
    deadline = time.monotonic() + START_DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


class RelayProcess:
    """`relay serve` on a free port. Settings are given as keyword arguments: heartbeat_s=0.05. It compresses
    for whoever accepts it, which every second `Reading` and all SDKs and browsers do, and logs for people."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.port = int(url.rsplit(":", 1)[1])

    @classmethod
    def start(cls, *, journal: str, upstream: str = "", port: int = 0, **settings: Any) -> RelayProcess:
        arguments = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "relay",
            "serve",
            "--journal",
            journal,
            "--port",
            str(port),
        ]
        if upstream:
            arguments += ["--upstream", upstream]
        for name, value in ({"compress": "always", "log_format": "text"} | settings).items():
            flag = "--" + name.replace("_", "-")
            for item in value if isinstance(value, list | tuple) else [value]:
                arguments += [flag] if item is True else [flag, str(item)]
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        log: list[str] = []
        ready = threading.Event()
        url: list[str] = []

        def drain() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    log.append(line.rstrip("\n"))
                    match = re.search(r"ready on (http://\S+)", line)
                    if match and not url:
                        url.append(match[1])
                        ready.set()
            ready.set()

        threading.Thread(target=drain, daemon=True).start()
        if not ready.wait(START_DEADLINE_S) or not url:
            process.kill()
            process.wait()
            raise AssertionError("relay did not start:\n" + "\n".join(log))
        return cls(process, url[0], log)

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """A whole answer: status, headers with names in lower case, body."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, headers=names)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _lower(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _lower(error.headers), error.read()

    def json(self, path: str, **headers: str) -> Any:
        return json.loads(self.get(path, **headers)[2])

    def metric(self, line_start: str) -> float:
        """The value of the metric line that begins so; 0 when there is none."""
        for line in self.get("/relay/metrics")[2].decode().splitlines():
            if line.startswith(line_start):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for what relay comes to in its own time."""
        deadline = time.monotonic() + START_DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}"
            time.sleep(0.01)

    def await_waiting_client(self) -> None:
        """Until somebody waits for a stream to be created: who does is counted among the readers, and is none
        that is listed. Readers that left may still be both, and be gone at the next look."""

        def waits() -> bool:
            listed = len(self.json("/relay/v1/diagnostics")["readers"])
            return self.metric("relay_readers_open") > listed

        self.until(waits, "somebody waits for a stream")

    def logged_line(self, words: str, *, since: int = 0) -> str:
        """The line of the log, from line `since` on, that holds these words; it comes through a pipe, when it
        comes."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            for line in self.log[since:]:
                if words in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"the log does not say {words!r}:\n" + "\n".join(self.log[since:]))

    def rss_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def stop(self) -> None:
        """SIGTERM, and wait for it to end by itself."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError("relay did not stop on SIGTERM:\n" + "\n".join(self.log)) from None

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
