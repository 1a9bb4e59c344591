"""Programs of others that check the files of deploy/, or run them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])


def tool(name: str) -> str:
    """Where a program is; a test that needs one that is not here is skipped, and says which."""
    found = shutil.which(name, path=SEARCHED)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
