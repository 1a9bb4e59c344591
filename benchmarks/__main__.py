"""Run the benchmarks.

python -m benchmarks                all of them; prints a table and writes benchmarks/results.json
python -m benchmarks b3 b8          some of them; prints only
python -m benchmarks --quick        a smoke run in seconds, whose figures mean nothing; prints only
--out FILE                          write the results there
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.processes import Lab, machine_busy_s
from benchmarks.report import Report, machine, table

RESULTS = Path(__file__).parent / "results.json"

DISTURBED_CORES = 0.15
"""Use of the machine by others from which on figures are marked."""


def found() -> dict[str, ModuleType]:
    """The benchmarks by name: a budget's, like `b3_proxy`, by the budget's; others by all of theirs."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    called = {
        name.partition("_")[0] if re.match(r"b\d", name) else name: name
        for name in names
        if re.match(r"b\d+_|scale_", name)
    }
    return {short: importlib.import_module(f"benchmarks.{name}") for short, name in called.items()}


class Disturbance:
    """What the rest of the machine did during a benchmark."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._others_before = self._others_s()

    @staticmethod
    def _others_s() -> float:
        ours = os.times()  # of children, those that have been waited for: all, once the lab is closed
        return machine_busy_s() - ours.user - ours.system - ours.children_user - ours.children_system

    def tell(self, report: Report) -> None:
        """Write it down, and warn where it was too much to believe the figures."""
        cores = max(0.0, self._others_s() - self._others_before) / (time.monotonic() - self._began)
        report.details["others_cpu"] = round(cores, 3)
        if cores > DISTURBED_CORES:
            report.note(
                f"DISTURBED: other processes used {cores:.2f} cores meanwhile. Latencies, and verdicts on "
                "them, are the machine's."
            )


def main() -> None:
    """Run what was asked for."""
    modules = found()
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure relay beside its peers.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(modules)}; default all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help=f"where to write the results; a full run: {RESULTS.name}")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(modules)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    names = arguments.names or list(modules)
    described = machine()
    began = time.monotonic()
    reports: dict[str, Report] = {}
    for name in names:
        print(f"{name}: {modules[name].TITLE} …", file=sys.stderr, flush=True)
        disturbance = Disturbance()
        with Lab.open() as lab:
            reports[name] = modules[name].run(lab, arguments.quick)
        disturbance.tell(reports[name])
    print(table(list(reports.values())))
    out = arguments.out
    if out is None and not arguments.names and not arguments.quick:
        out = RESULTS
    if out is not None:
        results = {
            "machine": described,
            "quick": arguments.quick,
            "seconds": round(time.monotonic() - began),
            "benchmarks": {name: report.as_object() for name, report in reports.items()},
        }
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
