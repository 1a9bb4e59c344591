"""Unmodified JavaScript SDKs that read from relay: a whole answer passes, and one that broke off raises."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from recorded_answers import AG_UI, AI_SDK, Answer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

ASK = Path(__file__).resolve().parent.parent / "js" / "ask_agent.mjs"

DEADLINE_S = 300
PACKAGES = ("ai@6", "@ag-ui/client@1")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, timeout=DEADLINE_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program beside the SDKs; where they cannot be had, its tests are skipped, and say so."""
    if shutil.which("npm") is None:
        pytest.skip("the JavaScript SDKs were not tried: there is no npm to install them with")
    folder = tmp_path_factory.mktemp("sdks")
    (folder / "package.json").write_text("{}")
    flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=1")
    installed = run("npm", "install", *flags, *PACKAGES, cwd=folder)
    if installed.returncode != 0:
        reason = installed.stdout.strip().splitlines()[-1]
        pytest.skip(f"the JavaScript SDKs were not tried: npm could not install them: {reason}")
    return Path(shutil.copy(ASK, folder))


def ask(
    program: Path,
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    answer: Answer,
    events: list[bytes],
) -> dict[str, Any]:
    """What the SDK made of such an answer."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}", *answer.headers)
        for event in events:
            await exchange.chunk(event)
        await exchange.end()

    upstream.on(f"/{name}{answer.path}", handler)
    url = f"{relay.url}/{name}{answer.path}"
    outcome = run("node", program, answer.dialect, url, cwd=program.parent)
    assert outcome.returncode == 0, outcome.stdout
    said: dict[str, Any] = json.loads(outcome.stdout)
    return said


each_answer = pytest.mark.parametrize("answer", [AI_SDK, AG_UI], ids=lambda answer: answer.dialect)


@each_answer
def test_a_whole_answer_passes(
    program: Path, relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(program, relay, upstream, name, answer, answer.events)
    assert said == {"text": "Hello", "error": None}
    assert whole_run(relay, name).outcome == ("completed", "upstream_end")


@each_answer
def test_an_answer_that_broke_off_is_an_error(
    program: Path, relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(program, relay, upstream, name, answer, answer.events[: answer.shown])
    assert said == {"text": "Hel", "error": "Upstream ended without its terminal marker."}


@each_answer
def test_upstreams_own_error_is_one(
    program: Path, relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    said = ask(program, relay, upstream, name, answer, [*answer.events[: answer.shown], answer.error])
    assert said == {"text": "Hel", "error": "boom"}
