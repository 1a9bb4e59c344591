"""The table of docs/clients.md says what the matrix tries, and nothing else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from clients.matrix import COLUMNS, ROWS, Row

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text()
USE_CHAT = ROOT / "tests" / "browser" / "test_use_chat.py"


def marks(row: Row, reasons: list[str]) -> list[str]:
    """A mark a column, or the footnote's."""
    return [
        f"[^{reasons.index(row.cannot[column]) + 1}]" if column in row.cannot else "✓" for column in COLUMNS
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_the_rows_and_the_marks_of_the_matrix() -> None:
    reasons = list(dict.fromkeys(reason for row in ROWS for reason in row.cannot.values()))
    head, _, *lines = [cells(line) for line in PAGE.splitlines() if line.startswith("|")]
    assert head == ["client", "version", *COLUMNS]
    assert [line[0] for line in lines] == [row.title for row in ROWS]
    assert [line[2:] for line in lines] == [marks(row, reasons) for row in ROWS]
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.+(?:\n(?!\n).+)*)", PAGE, re.MULTILINE))
    assert {number: " ".join(note.split()) for number, note in notes.items()} == {
        str(number): reason for number, reason in enumerate(reasons, 1)
    }


def test_the_versions_of_pinned_packages_are_those_that_are_tried() -> None:
    pinned = json.loads((ROOT / "tests" / "js" / "package.json").read_text())["dependencies"]
    lines = [cells(line) for line in PAGE.splitlines() if line.startswith("|")][2:]
    for (title, version, *_), row in zip(lines, ROWS, strict=True):
        kind, _, package = row.package.partition(":")
        if kind == "npm":
            assert pinned[package].rpartition("@")[2] in version.split(", "), title
        else:
            assert re.fullmatch(r"\d+(\.\d+)*", version), title


def test_each_column_is_tried_here_or_elsewhere_or_cannot_be() -> None:
    there = {node.name for node in ast.parse(USE_CHAT.read_text()).body if isinstance(node, ast.FunctionDef)}
    for row in ROWS:
        assert set(row.cannot) <= set(COLUMNS)
        assert row.clients or set(row.elsewhere) == set(COLUMNS)
        assert set(row.elsewhere.values()) <= there


def test_each_client_is_said_how_to_be_used() -> None:
    for row in ROWS:
        assert f"\n- **{row.title}**: " in PAGE
