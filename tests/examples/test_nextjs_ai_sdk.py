"""A Next.js app behind relay, built and run: a reload, a second tab and Stop, as its README says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from relay_process import RelayProcess
from run_record import whole_run

from examples.example import Example, once

# A build takes some ten seconds, and minutes on a machine that has much else to do.
BUILD_DEADLINE_S = 600
PACE_MS = "15"


class Scene(NamedTuple):
    """The example, running."""

    example: Example
    relay: RelayProcess


@pytest.fixture(scope="module")
def scene(node_packages: Path) -> Iterator[Scene]:
    """Built beside the packages of the tests, where it finds its own: they are of the same versions."""
    place = node_packages.parent / "build"
    place.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=place) as directory,
        contextlib.closing(Example("nextjs-ai-sdk", Path(directory), 3000, 8080)) as example,
    ):
        built = subprocess.run(
            ["bash", "-c", example.command("npm run build")],
            cwd=example.directory,
            env=os.environ | {"NEXT_TELEMETRY_DISABLED": "1"},
            timeout=BUILD_DEADLINE_S,
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stdout + built.stderr
        environment = {"PACE_MS": PACE_MS, "NEXT_TELEMETRY_DISABLED": "1", "HOSTNAME": "127.0.0.1"}
        with (
            example.server("npm start", 3000, **environment),
            example.relay(port=example.ports[8080]) as relay,
        ):
            yield Scene(example, relay)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def await_words(page: Page, turn: int, least: int) -> str:
    """Wait until so many words of an answer are shown, and give what is."""
    answers = page.locator(".assistant")
    expect(answers.nth(turn)).to_have_text(re.compile(rf"(\S+\s+){{{least}}}"))
    return (answers.nth(turn).text_content() or "").removeprefix("🤖 ")


def answer_to(question: str) -> str:
    """What the example's model says."""
    return f"You said: {question}. Say more, and so will I."


def expect_part_of(text: str, answer: str) -> None:
    """This much of it, once."""
    assert text
    assert answer.startswith(text)


def test_an_answer_survives_a_reload_is_followed_by_a_second_tab_and_stopped_in_both(
    scene: Scene, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(scene.relay.url)
    page.wait_for_url("**/chat/*")
    ask(page, "Hello")
    expect(page.locator(".assistant")).to_have_text("🤖 " + answer_to("Hello"))
    expect(page.locator("output")).to_have_text("ready")

    question = " ".join(f"word-{n}" for n in range(5000))
    ask(page, question)
    before = await_words(page, 1, 5)
    page.reload()
    again = await_words(page, 1, before.count(" ") + 5)
    second = context.new_page()
    second.goto(page.url)
    await_words(second, 1, again.count(" ") + 5)
    for tab in (page, second):
        expect(tab.locator(".assistant")).to_have_count(2)
        expect_part_of(await_words(tab, 1, 5), answer_to(question))

    second.get_by_role("button", name="Stop").click()
    stream = page.url.rpartition("/")[2]
    assert whole_run(scene.relay, stream).outcome == ("cancelled", "client_cancel")
    shown = scene.relay.json(f"/relay/v1/streams/{stream}/runs/latest/transcript")["text"]
    expect_part_of(shown, answer_to(question))
    for tab in (page, second):
        expect(tab.locator("output")).to_have_text("ready")
    assert await_words(page, 1, 5) == shown
    expect_part_of(await_words(second, 1, 5), shown)  # it left, maybe before it had heard the last word

    # The app was hung up on, and kept what it had said, which is no less than what was shown.
    kept = scene.example.directory / ".chats" / f"{stream}.json"
    once(lambda: len(json.loads(kept.read_text())) == 4)
    page.reload()
    assert await_words(page, 1, 5).startswith(shown)
    expect_part_of(await_words(page, 1, 5), answer_to(question))
    expect(page.locator("output")).to_have_text("ready")


def test_the_example_names_the_versions_that_are_tested(scene: Scene, node_packages: Path) -> None:
    tested = json.loads((node_packages.parent / "package.json").read_text())["dependencies"]
    named = json.loads((scene.example.directory / "package.json").read_text())["dependencies"]
    assert named.items() <= tested.items()
