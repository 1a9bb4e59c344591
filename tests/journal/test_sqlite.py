"""What only the SQLite journal has: a file, a lock, a writing thread. The rest is in tests/contract."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from relay.cursor import ORIGIN, Cursor
from relay.errors import JournalRefused, JournalUnavailable, RelayError, StartupError, UnknownStream
from relay.frame import Event, Frame
from relay.journal import sqlite, sqlite_file, sqlite_store
from relay.journal.base import Append, Appended, Claim, Page, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, ending
from relay.limits import Retention

P = ParamSpec("P")

NOON = 1_763_726_400_000
DAY_S = 24 * 3600


def on_a_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def within_a_minute() -> None:
            await asyncio.wait_for(test(*args, **kwargs), 60)

        asyncio.run(within_a_minute())

    return run


class Notes:
    """A follower that writes down what it is told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.deleted: list[str] = []
        self.sealed: list[str] = []

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        self.frames += frames

    def on_deleted(self, stream: str) -> None:
        self.deleted.append(stream)

    def on_sealed(self, stream: str) -> None:
        self.sealed.append(stream)

    def on_doubt(self, stream: str) -> None:
        pass


class SteeredClock:
    def __init__(self) -> None:
        self.ms = NOON

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock()


async def started(path: Path, **options: Any) -> SqliteJournal:
    journal = SqliteJournal(path, **options)
    await journal.start(Notes())
    return journal


def opening(stream: str = "s", run: str = "r", **changes: Any) -> RunOpening:
    given: dict[str, Any] = {"writer": "w", "token": f"token-{stream}-{run}", "retention": Retention(0, 0, 0)}
    return RunOpening(stream, run, **(given | changes))


def batch(seq: int, *data: bytes, stream: str = "s", run: str = "r", **changes: Any) -> Append:
    given: dict[str, Any] = {"events": [Event("delta", each) for each in data]}
    return Append(stream, run, "w", seq, **(given | changes))


async def page(journal: SqliteJournal, stream: str = "s") -> Page:
    return await journal.read(stream, ORIGIN, 1_000_000, 1 << 40)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Ask the file itself, as a shell would."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def count(path: Path, table: str) -> int:
    counted: int = rows(path, f"SELECT count(*) FROM {table}")[0][0]
    return counted


async def in_writer(journal: SqliteJournal, sql: str) -> None:
    """Run SQL on the writing connection: the limits SQLite has for a disk that is full belong to one."""
    writer = journal._writer
    assert writer is not None
    await writer.submit("", lambda: writer.store._db.execute(sql).fetchall())


# Restarts.


@on_a_loop
async def test_everything_survives_a_restart_and_ids_go_on(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(metadata='{"a":1}', answer="200"))
    await journal.append(batch(1, b"a", b"b", text_bytes=2))
    await journal.claim("key", "digest", "owner", 60, 3600)
    before = (await page(journal), await journal.describe("s"), await journal.run("s", "r"))
    await journal.close()

    clock.ms -= 1000
    journal = await started(path, clock_ms=clock)
    assert (await page(journal), await journal.describe("s"), await journal.run("s", "r")) == before
    assert await journal.resolve_token("token-s-r") == ("s", "r")
    assert (await journal.claim("key", "digest", "another", 60, 3600)).state == "pending"
    assert await journal.append(batch(2, b"b", b"c")) == Appended(Cursor(4, NOON), 1, 1, 4)
    await journal.close()


@on_a_loop
async def test_the_same_journal_can_be_started_again(path: Path) -> None:
    journal = SqliteJournal(path)
    for n in range(3):
        await journal.start(Notes())
        await journal.open_run(opening(run=f"r{n}"))
        await journal.close()
        await journal.close()
    await journal.start(Notes())
    assert (await journal.describe("s")).runs == 3
    await journal.close()


@on_a_loop
async def test_close_finishes_what_was_queued_and_folds_the_log_into_the_file(path: Path) -> None:
    journal = await started(path)
    await journal.open_run(opening())
    appends = [asyncio.ensure_future(journal.append(batch(n, b"x"))) for n in range(1, 101)]
    await asyncio.sleep(0)
    await journal.close()
    assert [(await append).last.seq for append in appends] == list(range(2, 102))
    assert sorted(os.listdir(path.parent)) == ["relay.db", "relay.db.lock"]
    assert count(path, "frames") == 101


@on_a_loop
async def test_a_closed_journal_is_unavailable(path: Path) -> None:
    journal = SqliteJournal(path)
    await journal.close()
    await journal.start(Notes())
    await journal.close()
    for call in (journal.open_run(opening()), journal.append(batch(1, b"x")), journal.delete("s")):
        with pytest.raises(JournalUnavailable):
            await call
    with pytest.raises(JournalUnavailable):
        await journal.describe("s")


APPEND_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from relay.frame import Event
from relay.journal.base import Append, RunOpening
from relay.limits import Retention
from relay.journal.sqlite import SqliteJournal

class Deaf:
    def on_frames(self, *told): ...
    def on_deleted(self, *told): ...
    def on_sealed(self, *told): ...
    def on_doubt(self, *told): ...

async def write(journal, run):
    seq = 1
    while True:
        events = [Event("delta", f"{run}:{seq + i}".encode()) for i in range(7)]
        answer = await journal.append(Append("s", run, "w", seq, events))
        seq = answer.next_seq
        print(run, seq - 1, flush=True)

async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.start(Deaf())
    for run in "abcdefgh":
        await journal.open_run(RunOpening("s", run, "w", run, Retention(0, 0, 0)))
    await asyncio.gather(*(write(journal, run) for run in "abcdefgh"))

asyncio.run(main())
"""


@contextmanager
def writing_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that appends for ever and says what was acknowledged."""
    command = [sys.executable, "-c", APPEND_UNTIL_KILLED, str(path)]
    root = Path(sqlite.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            yield process
        finally:
            process.kill()


@on_a_loop
async def test_a_process_killed_in_mid_append_leaves_a_consistent_journal(path: Path) -> None:
    """All that was acknowledged is there, each batch whole, and the run goes on where it was."""
    acknowledged: dict[str, int] = {}
    with writing_process(path) as process:
        assert process.stdout is not None
        for _ in range(400):
            run, said = process.stdout.readline().split()
            acknowledged[run] = int(said)
        process.send_signal(signal.SIGKILL)
        for line in process.stdout:  # what it had said before it died
            if line.endswith("\n"):
                run, said = line.split()
                acknowledged[run] = int(said)
        process.wait()

    journal = await started(path)
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    frames = (await page(journal)).frames
    info = await journal.describe("s")
    assert [frame.seq for frame in frames] == list(range(1, info.extent.top.seq + 1))
    assert info.bytes_held == sum(len(frame.data) for frame in frames)
    assert len(acknowledged) == 8
    for run, said in acknowledged.items():
        own = [frame for frame in frames if frame.run == run and not frame.is_control]
        known = await journal.run("s", run)
        assert [frame.data.decode() for frame in own] == [f"{run}:{n}" for n in range(1, known.frames + 1)]
        assert known.frames >= said
        assert known.frames % 7 == 0
        assert (known.last_data, known.last) == (own[-1].seq, own[-1].id)
        assert (await journal.append(batch(known.frames + 1, b"on", run=run))).appended == 1
    await journal.close()


# Refusals to start.


@on_a_loop
async def test_a_journal_held_by_another_process_is_refused(path: Path) -> None:
    with writing_process(path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StartupError, match="held by another relay") as refused:
            await SqliteJournal(path).start(Notes())
        assert str(path) in refused.value.detail
    journal = await started(path)
    await journal.close()


@on_a_loop
async def test_a_journal_is_held_once_within_a_process_too(path: Path) -> None:
    first = await started(path)
    with pytest.raises(StartupError, match="held by another relay"):
        await SqliteJournal(path).start(Notes())
    await first.open_run(opening())
    await first.close()


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


# Failures while writing.


@on_a_loop
async def test_a_full_disk_is_an_error_and_not_a_corruption(path: Path) -> None:
    """Nothing that was accepted is lost, refusals are whole, and it goes on when there is room again."""
    journal = await started(path)
    await journal.open_run(opening())
    await journal.append(batch(1, *[b"x" * 1000] * 20))
    before = await page(journal)
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages + 2}")

    for _ in range(3):
        with pytest.raises(JournalRefused):
            await journal.append(batch(21, *[b"y" * 1000] * 100))
    assert await page(journal) == before
    assert (await journal.run("s", "r")).frames == 20
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]

    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    answer = await journal.append(batch(21, *[b"y" * 1000] * 100))
    assert (answer.appended, answer.last.seq) == (100, 121)
    assert list((await page(journal)).frames[:21]) == list(before.frames)
    await journal.close()


@on_a_loop
async def test_a_full_disk_refuses_the_whole_group_and_says_so_to_each(path: Path) -> None:
    journal = await started(path)
    for n in range(10):
        await journal.open_run(opening(run=f"r{n}"))
    before = await page(journal)
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages}")
    appends = [journal.append(batch(1, b"x" * 50_000, run=f"r{n}")) for n in range(10)]
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [JournalRefused] * 10
    assert len({id(outcome) for outcome in outcomes}) == 10
    assert await page(journal) == before
    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    answers = await asyncio.gather(*(journal.append(batch(1, b"x", run=f"r{n}")) for n in range(10)))
    assert [answer.last.seq for answer in answers] == list(range(11, 21))
    await journal.close()


@on_a_loop
async def test_a_follower_hears_nothing_of_what_was_refused(path: Path) -> None:
    notes = Notes()
    journal = SqliteJournal(path)
    await journal.start(notes)
    await journal.open_run(opening())
    journal.watch("s")
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalRefused):
        await journal.append(batch(1, b"x" * 50_000))
    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    await journal.append(batch(1, b"y"))
    assert [(frame.seq, frame.data) for frame in notes.frames] == [(2, b"y")]
    await journal.close()


@on_a_loop
async def test_a_database_locked_by_a_stranger_is_unavailable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    journal = await started(path)
    await journal.open_run(opening())
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailable):
            await journal.append(batch(1, b"a"))
        assert len((await page(journal)).frames) == 1
        stranger.execute("ROLLBACK")
    assert (await journal.append(batch(1, b"a"))).last.seq == 2
    await journal.close()


@on_a_loop
async def test_what_cannot_be_written_fails_alone(path: Path) -> None:
    """A text no encoding has is found out only when the group is written."""
    journal = await started(path)
    await journal.open_run(opening())
    await journal.open_run(opening(run="bad"))
    outcomes = await asyncio.gather(
        journal.append(batch(1, b"a")),
        journal.append(Append("s", "bad", "w", 1, [Event("\ud800", b"x")])),
        journal.append(batch(2, b"b")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Appended, UnicodeEncodeError, Appended]
    assert [frame.data for frame in (await page(journal)).frames[2:]] == [b"a", b"b"]
    assert (await journal.run("s", "bad")).frames == 0
    await journal.close()


@on_a_loop
async def test_an_opening_that_fails_half_way_leaves_no_trace(path: Path) -> None:
    """The stream it had created before is rolled back with it, in the file and in what is cached."""
    journal = await started(path)
    await journal.open_run(opening("other"))
    outcomes = await asyncio.gather(
        journal.append(batch(1, b"a", stream="other")),
        journal.open_run(opening(writer="\ud800")),
        journal.append(batch(1, b"b")),
        journal.append(batch(2, b"c", stream="other")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Appended, UnicodeEncodeError, UnknownStream, Appended]
    with pytest.raises(UnknownStream):
        await journal.describe("s")
    opened = await journal.open_run(opening())
    assert (opened.start, opened.first.seq) == (ORIGIN, 1)
    assert [frame.data for frame in (await page(journal, "other")).frames[1:]] == [b"a", b"c"]
    await journal.close()


@on_a_loop
async def test_what_is_cached_never_disagrees_with_the_file(path: Path, clock: SteeredClock) -> None:
    """After successes and refusals of every kind in shared groups, a fresh start answers the same."""
    journal = await started(path, clock_ms=clock)
    tight = Retention(max_frames=9, max_bytes=120)
    for step in range(30):
        stream, run = f"s{step % 3}", f"r{step % 4}"
        await asyncio.gather(
            journal.open_run(opening(stream, run, retention=tight)),
            journal.append(batch(1, b"x" * step, b"y", stream=stream, run=run)),
            journal.append(batch(3, b"z", stream=stream, run=run, dialect=f"d{step}")),
            journal.append(batch(99, b"gap", stream=stream, run=run)),
            journal.open_run(opening(stream, "bad", token="\ud800")),
            journal.append(batch(4, b"end", stream=stream, run=run, ending=ending(Reason.PRODUCER_END))),
            journal.trim(stream, step),
            journal.delete(stream if step % 11 == 10 else "nowhere"),
            return_exceptions=True,
        )
        clock.ms += step - 7
    await asyncio.gather(*(journal.open_run(opening(f"s{n}", "last")) for n in range(3)))
    answers = [await journal.append(batch(1, b"a", stream=f"s{n}", run="last")) for n in range(3)]
    await journal.close()

    journal = await started(path, clock_ms=clock)
    for n, answer in enumerate(answers):
        held, info = await page(journal, f"s{n}"), await journal.describe(f"s{n}")
        assert info.extent.top == held.frames[-1].id == answer.last
        assert info.extent.earliest_seq == held.frames[0].seq
        assert [f.seq for f in held.frames] == list(range(info.extent.earliest_seq, answer.last.seq + 1))
        assert info.bytes_held == sum(len(frame.data) for frame in held.frames) <= 120
        assert len(held.frames) <= 9
    await journal.close()


# Group commit.


@on_a_loop
async def test_concurrent_appends_share_commits(path: Path) -> None:
    journal = await started(path)
    for n in range(50):
        await journal.open_run(opening(run=f"r{n}"))
    before = journal.commits
    for seq in range(1, 11):
        await asyncio.gather(*(journal.append(batch(seq, b"x", run=f"r{n}")) for n in range(50)))
    assert journal.commits - before < 500 / 5
    assert (await journal.describe("s")).extent.top.seq == 550
    await journal.close()


@on_a_loop
async def test_an_append_alone_is_committed_at_once(path: Path) -> None:
    """Another process that looks into the file sees it as soon as it was answered."""
    journal = await started(path)
    await journal.open_run(opening())
    for n in range(1, 6):
        await journal.append(batch(n, b"x"))
        assert count(path, "frames") == n + 1
    await journal.close()


@on_a_loop
async def test_state_dropped_from_the_cache_is_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "CACHE_MAX_ROWS", 2)
    journal = await started(path)
    for n in range(10):
        await journal.open_run(opening(f"s{n}"))
    for seq in range(1, 5):
        await asyncio.gather(*(journal.append(batch(seq, b"x", stream=f"s{n}")) for n in range(10)))
    tops = await journal.tops([f"s{n}" for n in range(10)])
    assert {top.id.seq for top in tops.values()} == {5}
    await journal.close()


# Expiry.


async def refusals(journal: SqliteJournal, *calls: Awaitable[Any]) -> list[type]:
    return [type(each) for each in await asyncio.gather(*calls, return_exceptions=True)]


@on_a_loop
async def test_an_expired_stream_is_unknown_at_once(path: Path, clock: SteeredClock) -> None:
    """Whatever is asked, before anything was swept."""
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    await journal.open_run(opening("eternal"))
    clock.ms += 10_000
    assert (await journal.describe("s")).runs == 1
    assert await journal.resolve_token("token-s-r") == ("s", "r")
    clock.ms += 1
    calls = (
        journal.read("s", ORIGIN, 10, 10),
        journal.describe("s"),
        journal.run("s", "r"),
        journal.trim("s", 1),
        journal.append(batch(1, b"x")),
    )
    assert await refusals(journal, *calls) == [UnknownStream] * 5
    assert await journal.resolve_token("token-s-r") is None
    assert dict(await journal.tops(["s"])) == {}
    assert [info.stream for info in await journal.streams("", 10)] == ["eternal"]
    await journal.delete("s")
    await journal.close()


@on_a_loop
async def test_an_append_renews_a_stream_and_a_read_does_not(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    for n in range(1, 5):
        clock.ms += 10_000
        await journal.append(batch(n, b"x"))
    clock.ms += 9_000
    await page(journal)
    await journal.append(batch(4, b"x"))  # a duplicate is no append
    clock.ms += 1_001
    with pytest.raises(UnknownStream):
        await page(journal)
    await journal.close()


@on_a_loop
async def test_an_expired_stream_is_replaced_by_one_with_later_ids(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10), seal=True))
    last = (await journal.append(batch(1, b"a"))).last
    clock.ms += 10_001
    opened = await journal.open_run(opening(writer="w", token="new"))
    info = await journal.describe("s")
    assert (opened.start, opened.first.seq) == (ORIGIN, 1)
    assert info.extent.created_ms > last.ms
    assert (info.runs, info.sealed, info.retention) == (1, False, Retention(0, 0, 0))
    assert (await journal.run("s", "r")).frames == 0
    assert await journal.resolve_token("token-s-r") is None
    assert await journal.resolve_token("new") == ("s", "r")
    assert [frame.run for frame in (await page(journal)).frames] == ["r"]
    await journal.close()


@on_a_loop
async def test_a_replacement_that_fails_takes_back_the_deletion_it_told_of(
    path: Path, clock: SteeredClock
) -> None:
    notes = Notes()
    journal = SqliteJournal(path, clock_ms=clock)
    await journal.start(notes)
    journal.watch("s")
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    clock.ms += 10_001
    with pytest.raises(UnicodeEncodeError):
        await journal.open_run(opening(run="r2", writer="\ud800"))
    assert notes.deleted == []
    clock.ms = NOON
    assert (await journal.append(batch(1, b"x"))).last.seq == 2
    await journal.close()


@on_a_loop
async def test_the_sweep_removes_what_expired_and_tells_who_watches(path: Path, clock: SteeredClock) -> None:
    notes = Notes()
    journal = SqliteJournal(path, clock_ms=clock)
    await journal.start(notes)
    journal.watch("s")
    await journal.open_run(opening(retention=Retention(retention_s=10), metadata='{"a":1}'))
    await journal.append(batch(1, *[b"x"] * 2500))
    await journal.open_run(opening("kept"))
    clock.ms += 10_001
    sweeps = 0
    while count(path, "frames") > 1 or count(path, "debris"):
        await journal.sweep()
        sweeps += 1
        assert sweeps < 10, "the sweep does not come to an end"
    assert [count(path, table) for table in ("streams", "runs", "run_texts")] == [1, 1, 0]
    assert notes.deleted == ["s"]
    assert len((await page(journal, "kept")).frames) == 1
    await journal.close()


@on_a_loop
async def test_a_deleted_stream_is_removed_from_the_file_without_harm_to_its_successor(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(metadata='{"a":1}'))
    await journal.append(batch(1, *[b"old"] * 1500))
    await journal.delete("s")
    await journal.open_run(opening(metadata='{"a":2}'))
    await journal.append(batch(1, b"new"))
    for _ in range(4):
        await journal.sweep()
    assert [count(path, table) for table in ("frames", "runs", "run_texts", "debris")] == [2, 1, 1, 0]
    assert (await page(journal)).frames[1].data == b"new"
    assert (await journal.run("s", "r")).metadata == '{"a":2}'
    await journal.close()


@on_a_loop
async def test_the_memory_of_former_lives_outlasts_a_day_and_a_restart(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    former = (await journal.open_run(opening())).first
    await journal.delete("s")
    clock.ms += DAY_S * 1000
    await journal.sweep()
    await journal.close()

    clock.ms = NOON - 5000
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening())
    assert (await journal.describe("s")).extent.created_ms > former.ms
    await journal.delete("s")
    clock.ms = NOON + 10 * DAY_S * 1000
    await journal.sweep()
    assert count(path, "tombstones") == 0
    await journal.close()


@on_a_loop
async def test_claims_nobody_can_use_any_more_are_swept(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.claim("settled", "digest", "owner", 10, 100)
    await journal.settle("settled", "owner", "s", "r")
    await journal.claim("lapsed", "digest", "owner", 10, 100)
    clock.ms += 50_000
    await journal.sweep()
    assert count(path, "claims") == 2
    assert await journal.claim("settled", "digest", "other", 10, 100) == Claim("settled", "s", "r")
    clock.ms += 60_001
    await journal.sweep()
    assert count(path, "claims") == 0
    await journal.close()


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
