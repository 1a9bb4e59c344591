"""What the tests of examples share: a copy of one, and Chromium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser.conftest import browser, context, page  # noqa: F401

from examples.example import Example

Copies = Callable[..., Example]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """Copies an example: its name, and the ports that its files name."""

    def make(name: str, *ports: int) -> Example:
        directory: Path = tmp_path_factory.mktemp(name)
        return Example(name, directory, *ports)

    return make
