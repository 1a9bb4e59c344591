"""Taking a SQLite journal's file: what is refused, in which words, and what its errors mean."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from journal_file import (
    Notes,
    on_a_loop,
    opening,
    rows,
    started,
)

from relay.errors import JournalRefused, JournalUnavailable, RelayError, StartupError
from relay.journal import sqlite_file
from relay.journal.sqlite import SqliteJournal


async def refusal_to_start(path: Path, **options: Any) -> str:
    """What a journal that does not start says; twice, because it must not hold the lock either."""
    said = []
    for _ in range(2):
        with pytest.raises(StartupError) as refused:
            await SqliteJournal(path, **options).start(Notes())
        said.append(refused.value.detail)
    assert said[0] == said[1]
    return said[0]


@on_a_loop
async def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere does not exist" in await refusal_to_start(tmp_path / "nowhere" / "relay.db")


def test_a_lock_file_that_cannot_be_made_is_said(path: Path) -> None:
    Path(f"{path}.lock").mkdir()
    said = asyncio.run(refusal_to_start(path))
    assert f"{path}.lock cannot be opened" in said
    assert f"Make {path.parent} writable" in said


def test_a_directory_that_cannot_be_written_is_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, user = Path(name), os.geteuid()
        directory.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            assert f"Make {directory} writable" in asyncio.run(refusal_to_start(directory / "relay.db"))
        finally:
            os.seteuid(user)
            directory.chmod(0o755)


def test_a_path_that_is_a_directory_is_said(path: Path) -> None:
    path.mkdir()
    assert str(path) in asyncio.run(refusal_to_start(path))


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"Dear diary, " * 1000)
    assert f"{path} is not a SQLite database" in asyncio.run(refusal_to_start(path))
    assert path.read_bytes() == b"Dear diary, " * 1000


@on_a_loop
async def test_another_programs_database_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE cookies (name TEXT)")
    assert "another program" in await refusal_to_start(path)
    assert rows(path, "SELECT name FROM sqlite_master") == [("cookies",)]


@on_a_loop
async def test_a_newer_schema_is_refused(path: Path) -> None:
    await (await started(path)).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {sqlite_file.SCHEMA_VERSION + 1}")
    assert "newer relay" in await refusal_to_start(path)


@on_a_loop
async def test_an_older_schema_is_refused_with_advice(path: Path) -> None:
    await (await started(path)).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {sqlite_file.SCHEMA_VERSION - 1}")
    said = await refusal_to_start(path)
    assert "older relay" in said
    assert "Move it away" in said


@on_a_loop
async def test_an_unknown_synchronous_mode_is_refused(path: Path) -> None:
    assert "normal" in await refusal_to_start(path, synchronous="sometimes")


@on_a_loop
async def test_a_sqlite_that_is_too_old_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "MIN_SQLITE", (99, 0, 0))
    assert "99.0.0 or newer" in await refusal_to_start(path)


@pytest.mark.parametrize("mode", ["off", "normal", "full", "extra"])
@on_a_loop
async def test_every_synchronous_mode_is_taken(path: Path, mode: str) -> None:
    journal = await started(path, synchronous=mode)
    await journal.open_run(opening())
    await journal.close()


def test_an_empty_file_becomes_a_journal(path: Path) -> None:
    async def use() -> None:
        journal = await started(path)
        await journal.open_run(opening())
        await journal.close()

    path.touch()
    asyncio.run(use())


def test_every_error_of_sqlite_that_is_not_our_mistake_has_a_name() -> None:
    """Full, read-only, input/output: refused. Locked, busy: unavailable. A wrong statement: neither."""
    expected: dict[int, type[RelayError] | None] = {
        sqlite3.SQLITE_FULL: JournalRefused,
        sqlite3.SQLITE_READONLY: JournalRefused,
        sqlite3.SQLITE_READONLY_DBMOVED: JournalRefused,
        sqlite3.SQLITE_IOERR_WRITE: JournalRefused,
        sqlite3.SQLITE_BUSY: JournalUnavailable,
        sqlite3.SQLITE_BUSY_SNAPSHOT: JournalUnavailable,
        sqlite3.SQLITE_LOCKED: JournalUnavailable,
        sqlite3.SQLITE_ERROR: None,
    }
    for code, kind in expected.items():
        error = sqlite3.OperationalError("as SQLite says")
        error.sqlite_errorcode = code
        answer = sqlite_file.journal_error(error)
        assert (type(answer) if answer else None) is kind


@on_a_loop
async def test_a_new_journal_is_readable_by_its_user_alone(tmp_path: Path) -> None:
    """It holds what people said; one that is there keeps the mode that it was given."""
    before = os.umask(0o022)
    try:
        new, given = tmp_path / "new.db", tmp_path / "given.db"
        given.touch(0o640)
        for path in (new, given):
            journal = SqliteJournal(path)
            await journal.start(Notes())
            files = [name for name in os.listdir(tmp_path) if name.startswith(path.name)]
            modes = {name: os.stat(tmp_path / name).st_mode & 0o777 for name in files}
            assert len(modes) > 1  # the log beside it, too
            assert modes[path.name] == (0o600 if path is new else 0o640)
            assert all(mode & 0o007 == 0 for mode in modes.values()), modes
            await journal.close()
    finally:
        os.umask(before)
