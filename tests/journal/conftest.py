"""The file and the clock of a SQLite journal that a test has to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from journal_file import (
    SteeredClock,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock()
