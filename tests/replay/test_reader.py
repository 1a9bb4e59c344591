"""relay.replay.reader: one cursor from the journal's pages into the tail, through every fault at the seam."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from pathlib import Path

import pytest
from replay.doubtful_journal import Stage, staged

from relay.cursor import ORIGIN, Cursor
from relay.errors import JournalUnavailable, ResumeUnknown, UnknownRun, UnknownStream
from relay.frame import Frame
from relay.journal.base import Page
from relay.replay.pages import SharedPage
from relay.replay.reader import Lease, LossUntold, Reader, ReaderEnd, Readers, find
from relay.replay.tail import WRITE_MAX_BYTES
from relay.replay.view import EventsView, View


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that could not say is asked again soon."""
    monkeypatch.setattr("relay.replay.reader.JOURNAL_RETRY_S", 0.01)


def events_view(control: str = "events", run: str | None = None) -> EventsView:
    return EventsView(run, control, False, False)


class Client:
    """What one reader wrote, and its loop as a task."""

    def __init__(
        self, stage: Stage, view: View | None = None, after: Cursor = ORIGIN, *, stalled: bool = False
    ) -> None:
        self.stage = stage
        self.view = view or events_view()
        self.after = after
        self.text = ""
        self.largest = 0
        self.stalls_at = b"\0"
        self.news = asyncio.Event()
        self.taking = asyncio.Event()
        if not stalled:
            self.taking.set()

    async def __aenter__(self) -> Client:
        page = SharedPage._make(await self.stage.journal.real.read("s", self.after, 1000, WRITE_MAX_BYTES))
        self.reader = Reader(
            self.stage.tails,
            "s",
            self.view,
            self.after,
            page,
            lease=Lease(self.stage.tails.now() + 3600, ReaderEnd.ROTATE),
        )
        self.task = asyncio.create_task(self.reader.run(self))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    @property
    def writable(self) -> bool:
        return self.taking.is_set()

    async def until_writable(self) -> None:
        await self.taking.wait()

    def write(self, data: bytes) -> bool:
        self.text += data.decode()
        self.largest = max(self.largest, len(data))
        self.news.set()
        if self.stalls_at in data:
            self.taking.clear()
        return self.writable

    async def until(self, text: str) -> None:
        while text not in self.text:
            self.news.clear()
            await self.news.wait()

    async def rested(self) -> None:
        """Wait until the reader sleeps at the end of a settled tail: no read of the journal is under way."""
        await self.stage.settled()
        tail = self.stage.tails.acquire("s")
        try:
            while self.reader.cohort is None and self.reader not in tail._waiting:
                await self.stage.journal.real.tops(["s"])
        finally:
            self.stage.tails.release(tail, self)

    def wake(self) -> None:
        """A client sleeps on its text alone."""

    @property
    def shape(self) -> list[str]:
        """Data frames by their data, control frames by their type."""
        return [
            f"<{match[1]}>" if match[1] else match[2]
            for match in re.finditer(r'^data: (?:\{"type":"([a-z._]+)".*|(.*))$', self.text, re.M)
        ]

    @property
    def words(self) -> list[str]:
        return [item for item in self.shape if not item.startswith("<")]


@pytest.mark.parametrize("order", [[], [0, 0, 1], [1, 0], [1], [0, 1, 0, 1]])
def test_p2_a_reader_sees_each_frame_once_whatever_becomes_of_the_hints(
    tmp_path: Path, order: list[int]
) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            async with Client(stage) as client:
                await client.until('"live"')
                await stage.settled()
                stage.journal.withheld = hints = []
                await stage.say("a")
                await stage.say("b", "c")
                stage.journal.withheld = None
                stage.journal.tell(*(hints[number] for number in order))
                if 1 not in order:
                    stage.tails._tails["s"].active_at = -1e9
                    await stage.tails.check_quiet()
                await client.until("data: c")
                await stage.say("d")
                await client.until("data: d")
                assert client.words == ["a", "b", "c", "d"]

    asyncio.run(test())


def test_p2_a_reader_far_behind_pages_through_the_journal_into_the_tail(tmp_path: Path) -> None:
    """More frames than the ring holds, while more are appended."""

    async def test() -> None:
        async with staged(tmp_path, ring_max_frames=10, ring_max_bytes=5000) as stage:
            await stage.open()
            said = [f"{n:05d}" + "x" * 100 for n in range(6000)]
            for n in range(0, 5000, 500):
                await stage.say(*said[n : n + 500])
            async with Client(stage) as client:
                for n in range(5000, 6000, 10):
                    await stage.say(*said[n : n + 10])
                await client.until(said[-1])
                assert client.words == said
                assert client.shape.count("<live>") <= 1
                assert client.largest < 3 * WRITE_MAX_BYTES

    asyncio.run(test())


def test_a_reader_whose_journal_fails_stays_and_gets_what_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, ring_max_frames=1) as stage:
            await stage.open()
            await stage.say("a")
            stage.journal.failing = 3
            async with Client(stage, after=ORIGIN) as client:
                await client.until("data: a")
                stage.journal.withheld = []
                await stage.say("b")
                await stage.say("c")
                stage.journal.failing = 2
                stage.journal.withheld = None
                stage.tails.on_doubt("s")
                await client.until("data: c")
                assert client.words == ["a", "b", "c"]

    asyncio.run(test())


def test_a_reader_is_told_that_its_stream_was_deleted_though_it_was_reading_a_page(tmp_path: Path) -> None:
    """The deletion comes between the journal's answer and the reader's sleep."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.journal.on_doubt = lambda stream: None  # the tail stays unknown, so the reader asks
            stage.journal.answer_first = True
            async with Client(stage) as client:
                await client.until('"live"')
                stage.journal.close_gate()
                while not stage.journal.arrived.is_set():
                    client.reader.wake()
                    await stage.journal.real.tops(["s"])
                await stage.journal.delete("s")
                stage.journal.gate.set()
                assert await client.task is ReaderEnd.DELETED
                assert '"reason":"deleted"' in client.text

    asyncio.run(test())


def test_a_reader_is_shown_how_an_open_run_ended_before_it_hears_of_the_deletion(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            async with Client(stage) as client:
                await client.until('"live"')
                await client.rested()
                await stage.journal.delete("s")
                assert await client.task is ReaderEnd.DELETED
            assert '"reason":"stream_deleted"' in client.text
            assert client.shape[-2:] == ["<run.ended>", "<bye>"]

    asyncio.run(test())


def test_p8_a_reader_waits_for_a_journal_that_gets_back_what_it_lost(tmp_path: Path) -> None:
    """Its tail is a new one, which knows no more than the journal has now."""

    async def test() -> None:
        async with staged(tmp_path, rewind_grace_s=3600) as stage:
            await stage.open()
            await stage.say("a")
            lost_after = (await stage.journal.real.tops(["s"]))["s"].id
            await stage.say("b")
            async with Client(stage) as client:
                await client.until("data: b")
                stage.journal.lost_after = lost_after
                tail = client.reader._tail
                tail.forget()
                tail.top = tail._floor = lost_after
                reads = stage.journal.reads
                client.reader.wake()
                await stage.until(lambda: stage.journal.reads >= reads + 3)
                stage.journal.lost_after = None
                await stage.say("c")
                await client.until("data: c")
                assert client.words == ["a", "b", "c"]
                assert "<reset>" not in client.shape

    asyncio.run(test())


def test_p8_a_reader_of_a_journal_that_gets_nothing_back_is_reset(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, rewind_grace_s=0.1) as stage:
            await stage.open()
            await stage.say("a")
            lost_after = (await stage.journal.real.tops(["s"]))["s"].id
            await stage.say("b")
            async with Client(stage) as client:
                await client.until("data: b")
                stage.journal.lost_after = lost_after
                stage.tails.on_doubt("s")
                await client.until('"reset","reason":"diverged"')
                assert client.words == ["a", "b"]

    asyncio.run(test())


def test_a_reader_hears_of_a_deletion_whose_message_was_lost(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, rewind_grace_s=0) as stage:
            await stage.open()
            stage.journal.on_deleted = lambda stream: None
            async with Client(stage) as client:
                await client.until('"live"')
                await stage.settled()
                await stage.journal.delete("s")
                stage.tails.on_doubt("s")
                assert await client.task is ReaderEnd.DELETED

    asyncio.run(test())


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_p8_a_reader_of_a_stream_that_was_made_anew_under_it_is_reset_once(
    tmp_path: Path, frames: int
) -> None:
    """Shorter, as long, and longer than the one it knew."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("old", "old")
            stage.journal.on_deleted = lambda stream: None
            async with Client(stage) as client:
                await client.until('"live"')
                await client.rested()
                stage.journal.withheld = []
                await stage.journal.delete("s")
                await stage.open(run="new")
                for _ in range(frames - 1):
                    await stage.say("new", run="new")
                stage.journal.withheld = None
                stage.tails.on_doubt("s")
                await client.until('"reset"')
                await stage.say("last", run="new")
                await client.until("data: last")
                assert client.text.count('"reset"') == 1
                assert '"reason":"recreated"' in client.text
                after = client.words[2:]
                assert after == ["new"] * (frames - 1) + ["last"]

    asyncio.run(test())


def test_p8_frames_trimmed_under_a_slow_reader_are_a_gap_told_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, ring_max_frames=1) as stage:
            await stage.open()
            async with Client(stage, stalled=True) as client:
                await client.until('"hello"')
                await stage.settled()
                for n in range(10):
                    await stage.say(str(n))
                await stage.journal.trim("s", 8)
                client.taking.set()
                await client.until("data: 9")
                assert client.shape.count("<gap>") == 1
                assert client.words == ["6", "7", "8", "9"]
                gap = re.search(r'"earliest":"(\d+)-\d+"\}\n\n', client.text[client.text.index('"gap"') :])
                assert gap is not None
                assert gap[1] == "8"

    asyncio.run(test())


@pytest.mark.parametrize("control", ["none", "events"])
def test_p8_loss_that_cannot_be_shown_breaks_the_connection(tmp_path: Path, control: str) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", "b", "c")
            await stage.journal.trim("s", 4)
            async with Client(stage, events_view(control)) as client:
                if control == "events":
                    await client.until("data: c")
                else:
                    with pytest.raises(LossUntold):
                        await client.task
                    assert client.words == []

    asyncio.run(test())


def test_a_finished_stream_of_which_nothing_is_held_says_bye_after_the_gap(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open(seal=True)
            await stage.say("a", end=True)
            await stage.journal.trim("s", 99)
            async with Client(stage) as client:
                assert await client.task is ReaderEnd.ENDED
                assert client.shape == ["<hello>", "<gap>", "<live>", "<bye>"] or client.shape == [
                    *("<hello>", "<gap>", "<bye>")
                ]
                assert "earliest" not in client.text  # there is none

    asyncio.run(test())


def test_a_run_whose_end_was_trimmed_away_ends_the_reader_though_the_journal_was_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", end=True)
            await stage.open(run="other")
            await stage.journal.trim("s", 4)
            failures = 2
            real_run = stage.journal.real.run

            async def run(stream: str, run: str) -> object:
                nonlocal failures
                if failures:
                    failures -= 1
                    raise JournalUnavailable
                return await real_run(stream, run)

            stage.journal.run = run
            async with Client(stage, events_view(run="r")) as client:
                assert await client.task is ReaderEnd.ENDED
                assert client.shape == ["<hello>", "<gap>", "<bye>"]

    asyncio.run(test())


def test_a_reader_of_one_run_passes_over_the_others_and_stops_behind_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.open(run="other")
            async with Client(stage, events_view(run="r")) as client:
                await client.until('"live"')
                await stage.say("theirs", run="other")
                await stage.say("mine")
                await stage.say("theirs too", run="other")
                await stage.say("mine too", end=True)
                assert await client.task is ReaderEnd.ENDED
                assert client.words == ["mine", "mine too"]
                assert client.shape[-2:] == ["<run.ended>", "<bye>"]
                assert client.reader.terminal is not None

    asyncio.run(test())


def test_an_idle_reader_does_not_ask_the_journal(tmp_path: Path) -> None:
    """No spin: it sleeps until there is news."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            async with Client(stage) as client:
                await client.until('"live"')
                await stage.settled()
                client.reader.wake()
                reads = stage.journal.reads
                for n in range(50):
                    await stage.say(str(n))
                    await client.until(f"data: {n}\n")
                assert stage.journal.reads == reads

    asyncio.run(test())


def test_who_leaves_while_asleep_is_said_goodbye(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            readers = Readers(heartbeat_s=15, write_timeout_s=30)
            async with Client(stage) as client:
                readers.add(client.reader, lambda: None)
                await client.until('"live"')
                readers.drain()
                assert await client.task is ReaderEnd.DRAIN
                assert re.search(
                    r'^retry: \d+\nevent: relay\ndata: .*"bye","reason":"drain"', client.text, re.M
                )
                assert stage.tails._tails["s"]._waiting == set()

    asyncio.run(test())


def test_who_was_let_in_before_a_drain_and_begins_after_it_is_sent_away_too(tmp_path: Path) -> None:
    """Nobody would tell it otherwise, and the process waits for it as long as it waits for anything."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            readers = Readers(heartbeat_s=15, write_timeout_s=30)
            readers.drain()
            async with Client(stage) as client:
                readers.add(client.reader, lambda: None)
                async with asyncio.timeout(60):
                    assert await client.task is ReaderEnd.DRAIN
                assert '"bye","reason":"drain"' in client.text

    asyncio.run(test())


def test_the_visit_beats_rotates_and_cuts(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            readers = Readers(heartbeat_s=15, write_timeout_s=30)
            aborted: list[str] = []
            async with Client(stage) as client, Client(stage, stalled=True) as stalled:
                readers.add(client.reader, lambda: aborted.append("client"))
                readers.add(stalled.reader, lambda: aborted.append("stalled"))
                assert len(readers) == 2
                await client.until('"live"')
                await stalled.until('"hello"')
                now = stage.tails.now()
                readers.visit(now + 1)
                readers.visit(now + 16)
                await client.until(": hb\n")
                assert aborted == []
                readers.visit(now + 31)
                assert aborted == ["stalled"]
                readers.visit(now + 4000)
                assert await client.task is ReaderEnd.ROTATE
                stalled.taking.set()
                assert await stalled.task is ReaderEnd.SLOW
                readers.discard(client.reader)
                readers.discard(stalled.reader)
                assert list(readers) == []

    asyncio.run(test())


class Frames(list[Frame]):
    """A page's frames, of which it can be known whether anybody still holds them."""


def test_p6_a_stalled_reader_holds_the_bytes_written_and_not_what_they_were_made_of(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, ring_max_frames=1) as stage:
            await stage.open()
            for _ in range(40):
                await stage.say(*("x" * 20_000 for _ in range(10)))
            pages: list[weakref.ref[Frames]] = []
            stalled = asyncio.Event()
            sizes: list[int] = []
            read = stage.journal.real.read

            async def watched_read(stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
                page = await read(stream, after, max_frames, max_bytes)
                frames = Frames(page.frames)
                pages.append(weakref.ref(frames))
                return page._replace(frames=frames)

            class Stalling:
                writable = True

                async def until_writable(self) -> None:
                    stalled.set()
                    await asyncio.Event().wait()

                def write(self, data: bytes) -> bool:
                    sizes.append(len(data))
                    self.writable = len(data) <= 20_000
                    return self.writable

            stage.journal.read = watched_read
            first_pages = [None, SharedPage._make(await watched_read("s", ORIGIN, 1000, WRITE_MAX_BYTES))]
            while first_pages:
                reader = Reader(stage.tails, "s", events_view(), ORIGIN, first_pages.pop())
                task = asyncio.create_task(reader.run(Stalling()))
                await stalled.wait()
                gc.collect()
                assert [page() for page in pages] == [None] * len(pages)
                assert WRITE_MAX_BYTES < sizes[-1] < WRITE_MAX_BYTES + 2 * 20_000
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                stalled.clear()

    asyncio.run(test())


def test_who_waits_for_a_stream_is_counted_and_sent_away_when_draining() -> None:
    readers = Readers(heartbeat_s=15, write_timeout_s=30)
    given_up: list[int] = []

    def give_up() -> None:
        given_up.append(1)

    readers.expect(give_up)
    assert len(readers) == 1
    readers.drain()
    assert given_up == [1]
    readers.expected(give_up)
    assert len(readers) == 0


# Looking for what a client knows to be there.


@pytest.mark.parametrize("unknown", [UnknownStream, UnknownRun, ResumeUnknown])
def test_what_a_journal_that_was_replaced_just_now_does_not_know_is_looked_for_again(
    tmp_path: Path, unknown: type[Exception]
) -> None:
    """And so is what is there, but less of it than its client was shown."""

    async def check() -> None:
        async with staged(tmp_path, rewind_grace_s=3600) as stage:
            stage.journal.replaced_at = stage.tails.now()
            answers: list[tuple[str, bool] | Exception] = [
                unknown("Not there."),
                ("less", True),
                ("all", False),
            ]

            async def look() -> tuple[str, bool]:
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            assert await find(stage.tails, look) == "all"

    asyncio.run(check())


def test_what_the_journal_never_knew_is_not_waited_for(tmp_path: Path) -> None:
    """Neither when it was replaced long ago, nor when it never was."""

    async def check() -> None:
        async with staged(tmp_path) as stage:
            looks = 0

            async def look() -> tuple[str, bool]:
                nonlocal looks
                looks += 1
                raise UnknownRun("Not there.")

            for replaced_at in (None, stage.tails.now() - stage.tails.settings.rewind_grace_s):
                if replaced_at is not None:
                    stage.journal.replaced_at = replaced_at
                with pytest.raises(UnknownRun):
                    await find(stage.tails, look)
            assert looks == 2

    asyncio.run(check())


def test_what_does_not_come_back_is_waited_for_no_longer_than_its_grace(tmp_path: Path) -> None:
    async def check() -> None:
        async with staged(tmp_path, rewind_grace_s=0.1) as stage:

            async def look() -> tuple[str, bool]:
                return "less", True

            assert await find(stage.tails, look) == "less"

    asyncio.run(check())


# --- cohorts: readers that the tail writes to itself ---------------------------------------------------


async def live(client: Client) -> None:
    await client.stage.until(lambda: client.reader.cohort is not None)


def asleep(client: Client) -> object:
    """What the reader's task waits for: another one after it was woken."""
    assert client.reader._sleep is not None
    assert not client.reader._sleep.done()
    return client.reader._sleep


def test_live_readers_at_one_place_are_written_to_as_one_and_sleep_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            async with (
                Client(stage) as one,
                Client(stage) as two,
                Client(stage, events_view("none")) as other,
            ):
                for client in (one, two, other):
                    await live(client)
                sleeps = [asleep(client) for client in (one, two, other)]
                await stage.say("a")
                for client in (one, two, other):
                    await client.until("data: a")
                await stage.say("b", "c")
                for client in (one, two, other):
                    await client.until("data: c")
                    assert client.words == ["a", "b", "c"]
                    assert client.reader.position.seq == 4
                assert [asleep(client) for client in (one, two, other)] == sleeps
                assert one.reader.cohort is two.reader.cohort
                assert one.reader.cohort is not other.reader.cohort

    asyncio.run(test())


def test_p2_who_comes_while_frames_wait_to_be_passed_on_gets_them_once_and_joins_the_others(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=3_600_000) as stage:
            await stage.open()
            async with Client(stage) as early, Client(stage) as too:
                for client in (early, too):
                    await live(client)
                await stage.say("a")  # at once, and the next an hour later
                await early.until("data: a")
                await stage.say("b")
                tail = stage.tails.acquire("s")
                await stage.until(lambda: tail.top.seq == 3)
                async with Client(stage) as late:
                    await live(late)
                    assert (early.words, late.words) == (["a"], ["a", "b"])
                    assert early.reader.cohort is not late.reader.cohort
                    for word in ("c", "d"):
                        await stage.say(word)
                        await stage.until(lambda: tail.top == tail._frames[-1].id)
                    await stage.until(lambda: tail.top.seq == 5)
                    tail._flush()
                    for client in (early, too, late):
                        assert client.words == ["a", "b", "c", "d"]
                    assert early.reader.cohort is late.reader.cohort is too.reader.cohort
                    assert early.reader.cohort is not None
                    assert len(early.reader.cohort.members) == 3
                    assert len(tail._cohorts) == 1
                await stage.until(lambda: late.task.done())
                assert len(early.reader.cohort.members) == 2
                stage.tails.release(tail, early)

    asyncio.run(test())


def test_p6_a_reader_that_falls_behind_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=0) as stage:
            await stage.open()
            async with Client(stage) as slow, Client(stage) as quick:
                for client in (slow, quick):
                    await live(client)
                slow.taking.clear()
                await stage.say("a")
                await quick.until("data: a")
                await stage.until(lambda: slow.reader.blocked_since is not None)
                await stage.say("b")
                await quick.until("data: b")
                assert slow.words == ["a"]  # nothing is written to who takes nothing
                assert slow.reader.cohort is None
                assert slow.reader.position.seq == 2
                assert slow.reader.lag == 1
                slow.taking.set()
                await slow.until("data: b")
                await live(slow)
                assert slow.words == quick.words == ["a", "b"]
                assert slow.reader.blocked_since is None
                assert slow.reader.cohort is quick.reader.cohort

    asyncio.run(test())


def test_a_heartbeat_goes_to_those_to_whom_nothing_was_written(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=0) as stage:
            await stage.open()
            async with Client(stage) as one, Client(stage, events_view("none", "q")) as other:
                for client in (one, other):
                    await live(client)
                readers = Readers(heartbeat_s=10, write_timeout_s=10)
                for client in (one, other):
                    readers.add(client.reader, lambda: None)
                before = stage.tails.now()
                one.reader._written_at = other.reader._written_at = before - 100
                for client in (one, other):
                    assert client.reader.cohort is not None
                    client.reader.cohort.written_at = before - 100
                await stage.say("a")  # which `other`, who reads another run, is not shown
                await one.until("data: a")
                readers.visit(stage.tails.now())
                await other.until(": hb")
                await stage.until(lambda: other.reader.cohort is not None)
                assert ": hb" not in one.text
                assert other.reader.written_at >= before
                readers.visit(stage.tails.now())
                assert other.text.count(": hb") == 1

    asyncio.run(test())


@pytest.mark.parametrize("reason", [ReaderEnd.DRAIN, ReaderEnd.ROTATE])
def test_who_is_sent_away_from_a_cohort_is_told_the_cursor_behind_what_it_was_written(
    tmp_path: Path, reason: ReaderEnd
) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=0) as stage:
            await stage.open()
            async with Client(stage) as leaves, Client(stage) as stays:
                for client in (leaves, stays):
                    await live(client)
                await stage.say("a")
                await stays.until("data: a")
                leaves.reader.leave(reason)
                await stage.say("b")
                await stays.until("data: b")
                assert await leaves.task is reason
                assert leaves.words == ["a"]
                bye = leaves.text.split("\n\n")[-2]
                assert f'"reason":"{reason}"' in bye
                assert bye.startswith("id: 2-")
                assert not stays.task.done()

    asyncio.run(test())


def test_live_readers_of_a_sealed_stream_end_with_its_last_run(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=0) as stage:
            await stage.open(seal=True)
            async with Client(stage) as one, Client(stage, events_view("none")) as other:
                for client in (one, other):
                    await live(client)
                await stage.say("a", end=True)
                for client in (one, other):
                    assert await client.task is ReaderEnd.ENDED
                    assert client.words == ["a"]

    asyncio.run(test())


def test_p6_what_is_more_than_one_write_comes_in_several_of_them(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, group_ms=3_600_000) as stage:
            await stage.open()
            async with Client(stage) as client:
                await live(client)
                await stage.say("first")  # at once, and the next an hour later
                await client.until("data: first")
                large = "x" * (WRITE_MAX_BYTES // 2)
                for _ in range(3):
                    await stage.say(large, large)
                tail = stage.tails.acquire("s")
                await stage.until(lambda: tail.top.seq == 8)
                tail._flush()
                await stage.until(lambda: client.reader.position == tail.top)
                assert client.words == ["first"] + [large] * 6
                assert client.largest < WRITE_MAX_BYTES * 2
                await live(client)
                stage.tails.release(tail, client)

    asyncio.run(test())


def test_p6_a_reader_that_does_not_take_its_goodbye_is_blocked_and_can_be_cut(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open(seal=True)
            await stage.say("a", end=True)
            async with Client(stage) as client:
                client.stalls_at = b'"bye"'
                cut: list[bool] = []
                readers = Readers(heartbeat_s=3600, write_timeout_s=10)
                readers.add(client.reader, lambda: cut.append(True))
                await client.until('"bye"')
                await stage.until(lambda: client.reader.blocked_since is not None)
                assert not client.task.done()
                readers.visit(stage.tails.now() + 11)
                assert cut == [True]
                client.taking.set()  # as the lost connection does
                assert await client.task is ReaderEnd.ENDED

    asyncio.run(test())
