"""The highest resident memory of a process, as the kernel keeps it."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.processes import Process

KIB = 1024
MIB = 1024 * KIB

FORGET_PEAK = "5"
"""What /proc/<pid>/clear_refs is told (proc(5)), so that the peak is counted from now on."""


class Growth:
    """How far a process grew beyond what it held when this was made, at its highest."""

    def __init__(self, process: Process) -> None:
        self._proc = Path(f"/proc/{process.pid}")
        (self._proc / "clear_refs").write_text(FORGET_PEAK)
        self._before = process.rss_bytes()

    def peak_bytes(self) -> int:
        """Since this was made."""
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._proc / "status").read_text())
        assert found is not None
        return max(0, int(found[1]) * KIB - self._before)
