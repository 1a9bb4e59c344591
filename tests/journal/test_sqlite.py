"""What only the SQLite journal has: one process, restarts, group commit. The rest is in tests/contract."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from journal_file import (
    NOON,
    Me,
    Notes,
    SteeredClock,
    batch,
    count,
    on_a_loop,
    opening,
    page,
    rows,
    started,
)

from relay.cursor import Cursor
from relay.errors import JournalUnavailable, StartupError
from relay.journal import sqlite
from relay.journal.base import Appended
from relay.journal.sqlite import SqliteJournal
from relay.journal.sqlite_file import WAL_CHECKPOINT_PAGES
from relay.limits import Retention

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
from relay.journal.sqlite_file import WAL_CHECKPOINT_PAGES

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
def a_process(script: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the journal and says what it did."""
    command = [sys.executable, "-c", script, str(path)]
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
    with a_process(APPEND_UNTIL_KILLED, path) as process:
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


# Runs of former processes.

OWN_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from relay.frame import Event
from relay.journal.base import Append, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.journal.sqlite_file import WAL_CHECKPOINT_PAGES
from relay.limits import Retention

class Ear:
    name = "former"
    def on_frames(self, *told): ...
    def on_deleted(self, *told): ...
    def on_sealed(self, *told): ...
    def on_doubt(self, *told): ...
    def on_run_over(self, *told): ...

async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.start(Ear(), Ear())
    for run, owner, answer in (("proxied", "former", "200"), ("raw", "former", "200"), ("pushed", "", "")):
        dialect = "raw" if run == "raw" else "openai-chat"
        await journal.open_run(RunOpening(
            "s", run, "w", run, Retention(0, 0, 0), dialect, answer=answer, owner=owner, deliver=True))
        await journal.append(Append("s", run, "w", 1, [Event("", b"said")], text_bytes=4))
    print("open", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@on_a_loop
async def test_p3_runs_of_a_killed_process_have_ended_once_the_next_one_has_started(path: Path) -> None:
    """Before anybody reads; a pushed run may go on, because its producer may."""
    with a_process(OWN_UNTIL_KILLED, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.send_signal(signal.SIGKILL)
        process.wait()

    for _ in range(2):
        journal = SqliteJournal(path)
        await journal.start(Notes(), Me())
        frames = (await page(journal)).frames[6:]
        assert [(frame.run, frame.event) for frame in frames] == [
            *(("proxied", ""), ("proxied", "relay")),
            ("raw", "relay"),
        ]
        assert b"error" in frames[0].data
        assert b'"status":"lost","reason":"owner_lost"' in frames[1].data
        assert b'"frames":1,"text_bytes":4' in frames[1].data
        lost, raw, pushed = await journal.runs("s", "", 10)
        assert (lost.status, lost.reason, lost.frames, lost.last) == ("lost", "owner_lost", 1, frames[1].id)
        assert (raw.status, raw.last_data, pushed.status) == ("lost", 4, "open")
        assert [delivery.run for delivery in await journal.claim_deliveries(10, 0)] == ["proxied", "raw"]
        assert (await journal.describe("s")).open_runs == ["pushed"]
        await journal.close()


@on_a_loop
async def test_nothing_of_a_process_is_lost_that_starts_again_under_its_name(path: Path) -> None:
    journal = SqliteJournal(path)
    await journal.start(Notes(), Me())
    await journal.open_run(opening(owner="me"))
    await journal.close()
    await journal.start(Notes(), Me())
    assert (await journal.append(batch(1, b"on"))).appended == 1
    await journal.close()
    await journal.start(Notes())
    assert (await journal.run("s", "r")).reason == "owner_lost"
    await journal.close()


@on_a_loop
async def test_orphans_of_an_expired_stream_expire_with_it(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(owner="former", retention=Retention(retention_s=10)))
    await journal.close()
    clock.ms += 10_001
    journal = await started(path, clock_ms=clock)
    assert dict(await journal.tops(["s"])) == {}
    await journal.close()


@on_a_loop
async def test_a_start_that_cannot_end_orphans_is_refused_and_leaves_them_whole(path: Path) -> None:
    """No room to write: nobody may be told that a lost run is open. With room again, it starts."""
    journal = await started(path)
    await asyncio.gather(*(journal.open_run(opening(f"s{n}", owner="former")) for n in range(300)))
    await journal.close()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, unlimited[1]))
    try:
        with pytest.raises(StartupError, match="Make room"):
            await SqliteJournal(path).start(Notes())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert rows(path, "SELECT count(*) FROM runs WHERE status = 'open'") == [(300,)]
    assert count(path, "frames") == 300
    journal = await started(path)
    assert {(await journal.run(f"s{n}", "r")).status for n in range(300)} == {"lost"}
    assert count(path, "frames") == 600
    await journal.close()


# One process.


@on_a_loop
async def test_a_journal_held_by_another_process_is_refused(path: Path) -> None:
    with a_process(APPEND_UNTIL_KILLED, path) as process:
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
async def test_what_is_committed_is_copied_out_of_the_log_while_the_journal_is_open(path: Path) -> None:
    """Long before the log is so long that the writing thread has to do it."""
    journal = await started(path)
    await journal.open_run(opening())
    for n in range(1, sqlite.CHECKPOINT_AFTER + 1):
        await journal.append(batch(n, b"x" * 1000))
    while os.stat(path).st_size < sqlite.CHECKPOINT_AFTER * 1000:
        await journal.tops(["s"])
    assert os.stat(f"{path}-wal").st_size < WAL_CHECKPOINT_PAGES * 4096
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
