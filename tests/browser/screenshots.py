"""Makes the pictures of the demo page in README.md: `python tests/browser/screenshots.py [FOLDER]`.

They show an answer that is being given, after a cut.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser.conftest import CHROMIUM, FLAGS  # noqa: E402

IMAGES = ROOT / "docs" / "images"

Scheme = Literal["dark", "light"]
PICTURES: dict[str, tuple[int, int, Scheme]] = {
    "demo-wide.png": (1280, 800, "light"),
    "demo-narrow.png": (390, 844, "dark"),
}


@contextmanager
def demo() -> Iterator[str]:
    """The URL of a `relay demo` with a journal of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "relay",
            "demo",
            "--port",
            "0",
            "--journal",
            f"sqlite:///{folder}/d.db",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            urls = (re.search(r"Open (http://\S+)", line) for line in process.stdout)
            try:
                yield next(found[1] for found in urls if found)
            finally:
                process.terminate()


def picture(browser: Browser, url: str, width: int, height: int, scheme: Scheme, path: Path) -> None:
    """Ask, cut the connection in mid-answer, come back, and take the picture."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(url)
    page.get_by_role("button", name="Ask").click()
    at_frame(page, 40)
    page.get_by_role("button", name="Cut").click()
    page.wait_for_timeout(2500)  # as a person would watch; the answer grows meanwhile
    page.get_by_role("button", name="Reconnect").click()
    expect(page.locator("#state")).to_have_text("live")
    page.mouse.move(0, 0)
    at_frame(page, 100)
    page.screenshot(path=path)
    context.close()


def at_frame(page: Page, least: int) -> None:
    """Wait for so many frames."""
    page.wait_for_function("least => document.getElementById('frames').textContent >= least", arg=least)


def main(images: Path) -> None:
    """Take them all."""
    images.mkdir(parents=True, exist_ok=True)
    program = next(found for name in CHROMIUM if (found := shutil.which(name)))
    with sync_playwright() as playwright, demo() as url:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        for name, (width, height, scheme) in PICTURES.items():
            picture(browser, url, width, height, scheme, images / name)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
