"""Programs of others that check the files of deploy/, or run them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])


def found(name: str) -> str | None:
    """Where a program is, if it is here."""
    return shutil.which(name, path=SEARCHED)


def tool(name: str) -> str:
    """Where a program is; a test that needs one that is not here is skipped, and says which."""
    program = found(name)
    if program is None:
        pytest.skip(f"{name} is not installed; `python3 dev.py setup` installs what the system has")
    return program
