"""What the tests of examples share: a copy of one, and Chromium."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser.conftest import browser, context, page  # noqa: F401

from examples.example import Example

Copies = Callable[..., Example]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copies]:
    """Copies an example: its name, and the ports that its files name."""
    with contextlib.ExitStack() as copies:

        def make(name: str, *ports: int) -> Example:
            directory: Path = tmp_path_factory.mktemp(name)
            return copies.enter_context(contextlib.closing(Example(name, directory, *ports)))

        yield make
