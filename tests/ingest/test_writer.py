"""The writer between its run and a journal whose answers get lost: every frame once, whatever was known."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from deaf_follower import DeafFollower
from redis_server import RedisServer
from rewinding import rewinding

from relay.cursor import Cursor
from relay.errors import Diverged, JournalUnavailable, Rewound, RunEnded
from relay.frame import Event
from relay.ingest.writer import HeldMemory, RunWriter
from relay.journal.base import Append, Appended, Retention, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, ending
from relay.settings import Settings


class Lossy(SqliteJournal):
    """A real journal that fails for a while: each outcome says whether the append was done before."""

    outcomes: list[str] = []
    tried = 0

    async def append(self, batch: Append) -> Appended:
        self.tried += 1
        outcome = self.outcomes.pop(0) if self.outcomes else "answered"
        if outcome == "lost before":
            raise JournalUnavailable("not sent")
        appended = await super().append(batch)
        if outcome == "lost after":
            raise JournalUnavailable("no answer")
        return appended


async def written(path: Path, outcomes: list[str], deadline_s: float = 30.0) -> tuple[Lossy, RunWriter]:
    journal = Lossy(path / "relay.db")
    await journal.start(DeafFollower())
    opening = RunOpening("s", "r", "w", "t" * 22, Retention(), owner="me")
    writer = RunWriter(journal, opening, Settings(journal_deadline_s=deadline_s), HeldMemory(10**6))
    writer.opened(await journal.open_run(opening))
    journal.outcomes = outcomes
    return journal, writer


async def texts(journal: Lossy) -> list[bytes]:
    page = await journal.read("s", Cursor(0, 0), 100, 10**6)
    return [frame.data for frame in page.frames if frame.event != "relay"]


@pytest.mark.parametrize(
    "outcomes",
    [
        [],
        ["lost before"],
        ["lost after"],
        ["lost after", "lost before", "lost after"],
        ["answered", "lost after"],
    ],
)
def test_p5_a_batch_whose_outcome_is_not_known_is_journaled_once(tmp_path: Path, outcomes: list[str]) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, list(outcomes))
        await writer.append([Event("", b"one"), Event("", b"two")], 6)
        await writer.append([Event("", b"three")], 5)
        await writer.append([Event("", b"four")], 4, "raw", ending(Reason.UPSTREAM_END))
        assert await texts(journal) == [b"one", b"two", b"three", b"four"]
        run = await journal.run("s", "r")
        assert (run.status, run.frames, run.text_bytes) == ("completed", 4, 15)
        assert journal.tried == 3 + sum(outcome != "answered" for outcome in outcomes)
        await journal.close()

    asyncio.run(check())


def test_p3_an_ending_whose_outcome_is_not_known_is_written_once(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, ["lost after"])
        await writer.append([Event("", b"one")], 3, "raw", ending(Reason.UPSTREAM_END))
        page = await journal.read("s", Cursor(0, 0), 100, 10**6)
        assert [b"run.ended" in frame.data for frame in page.frames] == [False, False, True]
        await journal.close()

    asyncio.run(check())


def test_after_its_deadline_it_gives_up_and_the_same_batch_can_be_given_again(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, ["lost after"], deadline_s=1e-300)
        with pytest.raises(JournalUnavailable):
            await writer.append([Event("", b"one")], 3)
        await writer.append_once([Event("", b"one"), Event("", b"two")], 6, "", None)
        assert await texts(journal) == [b"one", b"two"]
        await journal.close()

    asyncio.run(check())


def test_a_run_that_has_ended_is_no_reason_to_wait(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, [])
        await writer.append([], 0, "", ending(Reason.CLIENT_CANCEL))
        with pytest.raises(RunEnded):
            await writer.append([Event("", b"late")], 4)
        assert journal.tried == 2
        assert await texts(journal) == []
        await journal.close()

    asyncio.run(check())


# --- a journal that forgets -----------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["sqlite", "redis"])
END = ending(Reason.UPSTREAM_END)


async def begun(journal: Any, run: str = "r", memory: HeldMemory | None = None, **settings: Any) -> RunWriter:
    """A writer of a run in stream `s` that was opened just now, in a process of its own or one `memory`'s."""
    opening = RunOpening(
        "s", run, "w-" + run, "t" * 22, Retention(), dialect="raw", metadata='{"a": [1.5]}', answer="{}",
        owner="me",
    )  # fmt: skip
    # However slow the host is: what is held is not forgotten, and what is put back is waited for.
    patient = {"held_s": 3600, "rewind_grace_s": 3600}
    writer = RunWriter(journal, opening, Settings(**patient | settings), memory or HeldMemory(10**6))
    writer.opened(await journal.open_run(opening))
    return writer


async def said(writer: RunWriter, *words: str) -> None:
    for word in words:
        await writer.append([Event("", word.encode())], len(word))


@KINDS
@pytest.mark.parametrize("lost", ["the opening", "some frames", "the last frame", "nothing"])
def test_p2_what_a_rewound_journal_lost_is_put_back_under_the_same_ids(
    kind: str, lost: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            before = await begun(journal, "before")
            await said(before, "zero")
            if lost == "the opening":
                await journal.remember()
            writer = await begun(journal)
            await said(writer, "one")
            if lost == "some frames":
                await journal.remember()
            await writer.append([Event("a", b"two"), Event("b", b"three")], 8)
            if lost == "the last frame":
                await journal.remember()
            await said(writer, "four")
            if lost == "nothing":
                await journal.remember()
            held = await journal.frames("s")
            await journal.rewind()
            await said(writer, "five")
            await writer.append([], 0, "raw", END)
            frames = await journal.frames("s")
            assert frames[: len(held)] == held
            assert [frame.data for frame in frames[len(held) :]][:1] == [b"five"]
            run = await journal.run("s", "r")
            assert (run.status, run.frames, run.text_bytes) == ("completed", 5, 3 + 8 + 4 + 4)
            assert (run.metadata, run.token) != ("", "")
            assert writer.next_seq == 6

    asyncio.run(check())


@KINDS
def test_p2_whichever_writer_of_a_stream_finds_out_puts_back_the_frames_of_all(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            memory = HeldMemory(10**6)
            one, two = await begun(journal, "one", memory), await begun(journal, "two", memory)
            await journal.remember()
            for n in range(5):
                await said(one, f"one-{n}")
                await said(two, f"two-{n}")
            held = await journal.frames("s")
            await journal.rewind()
            await asyncio.gather(said(two, "after"), said(one, "after"))
            frames = await journal.frames("s")
            assert frames[: len(held)] == held
            assert [frame.data for frame in frames[len(held) :]] == [b"after", b"after"]

    asyncio.run(check())


@KINDS
def test_p2_a_writer_waits_for_frames_that_another_process_has_to_put_back(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            here, elsewhere = await begun(journal, "here"), await begun(journal, "elsewhere")
            await journal.remember()
            await said(elsewhere, "first")
            await said(here, "second")
            held = await journal.frames("s")
            await journal.rewind()
            with pytest.raises(Rewound):
                await here.append_once([Event("", b"third")], 5)
            await asyncio.gather(said(here, "third"), elsewhere.put_back(2))
            frames = await journal.frames("s")
            assert frames[:-1] == held
            assert frames[-1].data == b"third"

    asyncio.run(check())


@KINDS
def test_p2_writers_of_two_processes_put_back_in_time_what_they_wrote_in_turn(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Frame by frame in turn, as it was. And who is done first does not write in the place of what it saw the
    other write last."""

    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            seen = 0
            memories = HeldMemory(10**6, lambda stream: seen), HeldMemory(10**6, lambda stream: seen)
            one, two = await begun(journal, "one", memories[0]), await begun(journal, "two", memories[1])
            await journal.remember()
            for n in range(30):
                await said(one, f"one-{n}")
                await said(two, f"two-{n}", "and on")
            held = await journal.frames("s")
            seen = held[-1].seq
            await journal.rewind()
            first = asyncio.create_task(said(one, "after"))
            await asyncio.gather(first, said(two, "after"))
            frames = await journal.frames("s")
            assert frames[: len(held)] == held
            assert [frame.data for frame in frames[len(held) :]] == [b"after", b"after"]

    asyncio.run(check())


@KINDS
def test_frames_of_others_that_nobody_puts_back_are_waited_for_no_longer_than_readers_wait(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            writer = await begun(journal, memory=HeldMemory(10**6, lambda stream: 50), rewind_grace_s=0.1)
            await journal.remember()
            await said(writer, "lost")
            held = await journal.frames("s")
            await journal.rewind()
            await said(writer, "after")
            frames = await journal.frames("s")
            assert frames[:-1] == held
            assert frames[-1].data == b"after"

    asyncio.run(check())


@KINDS
@pytest.mark.parametrize("why", ["held too little", "others never come back", "written on meanwhile"])
def test_p3_what_cannot_be_put_back_ends_the_run_and_nothing_else_is_taken(
    kind: str, why: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            bound = 600 if why == "held too little" else 10**6
            writer = await begun(journal, held_max_bytes=bound, rewind_grace_s=0.1)
            other = await begun(journal, "other")
            await said(writer, "one")
            await journal.remember()
            if why == "others never come back":
                await said(other, "never")
            await said(writer, "two", "three", "four")
            await journal.rewind()
            if why == "written on meanwhile":
                await said(await begun(journal, "newer"), "else")
            if why != "others never come back":
                with pytest.raises(Diverged):  # at once: waiting would not help
                    await writer.append_once([Event("", b"five")], 4)
            with pytest.raises(Diverged):
                await said(writer, "five")
            with pytest.raises(Diverged):
                await said(writer, "six")
            await writer.append([], 0, "", ending(Reason.JOURNAL_LOST))
            run = await journal.run("s", "r")
            assert (run.status, run.reason, run.frames) == ("lost", "journal_lost", 1)

    asyncio.run(check())


@KINDS
def test_what_a_writer_holds_is_bounded_by_size_together_and_by_age(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            writer = await begun(journal, held_max_bytes=20_000)
            memory = writer._memory
            for _ in range(50):
                await said(writer, "x" * 1000)
                assert 0 < memory.bytes <= 20_000
            memory.max_bytes = 5_000
            await said(writer, "x" * 1000)
            assert 0 < memory.bytes <= 5_000
            writer.expire(asyncio.get_running_loop().time() + writer._settings.held_s)
            assert memory.bytes == 0
            await said(writer, "x" * 1000)
            writer.release()
            assert memory.bytes == 0

    asyncio.run(check())


@KINDS
@pytest.mark.parametrize("outcome", ["lost before", "lost after"])
def test_a_batch_sent_twice_is_held_under_the_ids_it_got(
    kind: str, outcome: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with rewinding(kind, tmp_path, redis_server) as journal:
            writer = await begun(journal)
            await said(writer, "one")
            await journal.remember()
            real = journal.inner.append

            async def unanswered(batch: Append) -> Appended:
                journal.inner.append = real
                if outcome == "lost after":
                    await real(batch)
                raise JournalUnavailable("no answer")

            journal.inner.append = unanswered
            await writer.append([Event("", b"two"), Event("", b"three")], 8)
            await writer.append([], 0, "", END)
            held = await journal.frames("s")
            await journal.rewind()
            await writer.put_back((await journal.run("s", "r")).last.seq)
            assert await journal.frames("s") == held
            assert (await journal.run("s", "r")).status == "completed"

    asyncio.run(check())
