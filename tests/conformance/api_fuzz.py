"""Requests made up from relay's own description, by schemathesis, against a real relay.

Every answer has to be one that is described: its status, its content type, its schema, in which no member
may stand that is not described. What is not described or not valid has to be refused, whoever may not do
something is, and nothing is ever 5xx or takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from relay.openapi import DESCRIPTION

ROOT = Path(__file__).resolve().parent.parent.parent

FUZZER = ROOT / ".venv" / "fuzzer"

ITS_FILES = ROOT / "tests" / "conformance" / "fuzzer"

# Streams end by themselves, soon: schemathesis reads each to its end.
SETTINGS: dict[str, Any] = {"heartbeat_s": 0.02, "reader_max_s": 0.05, "compress": "never"}

REQUEST_S = 20
"""A request that takes longer hangs."""

OPEN = ("PushedFrame", "Problem")
"""Objects that may have members which are not described."""


EVENTS = "/relay/v1/streams/{stream}/events"

EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"$ref": "#/components/schemas/Cursor"},
        "event": {"type": "string"},
        "data": {"type": "string"},
        "retry": {"type": "integer"},
    },
}
"""An event of a stream. Not every one has all of its fields."""


class Outcome(NamedTuple):
    """What became of one run of schemathesis, and all that it printed."""

    passed: bool
    said: str


def strict_description(*, guarded: bool) -> dict[str, Any]:
    """The description, in which objects have no other members than those described, and, if `guarded`,
    credentials are needed."""
    document: dict[str, Any] = json.loads(DESCRIPTION.read_text())
    for name, schema in document["components"]["schemas"].items():
        if name not in OPEN:
            _close(schema)
    contents = document["paths"][EVENTS]["get"]["responses"]["200"]["content"]
    contents["text/event-stream"]["schema"] = EVENT  # held to each event
    if guarded:
        for item in document["paths"].values():
            for operation in item.values():
                if isinstance(operation, dict):
                    operation["security"] = [choice for choice in operation["security"] if choice]
    return document


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for item in schema.values():
            _close(item)


def fuzz(url: str, folder: Path, seed: int, examples: int, credential: str, timeout_s: float) -> Outcome:
    """Run schemathesis once, in a process of its own, with so many examples an operation; `credential` is
    "" where none is needed. `folder` is for its files."""
    description = folder / "openapi.json"
    description.write_text(json.dumps(strict_description(guarded=bool(credential))))
    command = [
        *(str(FUZZER / "bin" / "schemathesis"), "--config-file", str(ITS_FILES / "schemathesis.toml")),
        *("run", str(description), "--url", url),
        *("--seed", str(seed), "--max-examples", str(examples), "--request-timeout", str(REQUEST_S)),
        *("--phases", "coverage,fuzzing,stateful"),
        *("--checks", "all", "--suppress-health-check", "all", "--generation-database", "none"),
        # They take it that only PUT on its own path makes a stream; starting a run in it does too.
        *("--exclude-checks", "use_after_free,ensure_resource_availability"),
        *("--no-color", "--continue-on-failure", "--warnings", "off"),
    ]
    if credential:
        command += ["--header", f"Authorization: Bearer {credential}"]
        command += ["--generation-with-security-parameters", "false"]  # the check of them has its own
    outcome = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(ITS_FILES / "hooks.py"), "COLUMNS": "150"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return Outcome(outcome.returncode == 0, outcome.stdout)
