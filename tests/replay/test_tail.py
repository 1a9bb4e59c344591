"""relay.replay.tail: an unbroken piece of the journal, whatever becomes of its hints."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from replay.doubtful_journal import Nobody, Stage, staged

from relay.cursor import ORIGIN, Cursor
from relay.frame import CONTROL_EVENT, Frame, run_started
from relay.replay.tail import Tail
from relay.replay.view import EventsView

VIEW = EventsView(None, "none", False, False)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that could not say is asked again soon."""
    monkeypatch.setattr("relay.replay.tail.RETRY_S", 0.01)


def held(tail: Tail) -> list[str]:
    """The data frames of the ring."""
    found = tail.next_chunk(VIEW, tail._floor)
    text = b"" if found is None else found.data
    return [line.removeprefix("data: ") for line in text.decode().split("\n") if line.startswith("data: ")]


class Sleeping:
    """A sleeper that counts how often it was woken."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    def wake(self) -> None:
        self.woken.set()


async def followed(stage: Stage) -> Tail:
    await stage.open()
    tail = stage.tails.acquire("s")
    await stage.settled()
    return tail


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 0, 1, 1, 2, 2, 0], [2], [0, 2], []])
def test_p2_hints_lost_doubled_late_or_out_of_order_cost_and_repeat_nothing(
    tmp_path: Path, order: list[int]
) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.withheld = hints = []
            await stage.say("a", "b")
            await stage.say("c")
            await stage.say("d", "e")
            stage.journal.withheld = None
            stage.journal.tell(*(hints[number] for number in order))
            if 2 not in order:
                tail.active_at = -1e9
                await stage.tails.check_quiet()
            await stage.settled()
            assert held(tail) == ["a", "b", "c", "d", "e"]

    asyncio.run(test())


def test_a_repeated_hint_is_not_read_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.withheld = hints = []
            await stage.say("a")
            stage.journal.tell(*hints)
            reads = stage.journal.reads
            for _ in range(10):
                stage.journal.tell(*hints)
            await stage.settled()
            assert stage.journal.reads == reads
            assert held(tail) == ["a"]

    asyncio.run(test())


@pytest.mark.parametrize("answer_first", [False, True])
def test_hints_that_come_while_the_journal_is_read_are_neither_lost_nor_taken_twice(
    tmp_path: Path, answer_first: bool
) -> None:
    """They may be in the journal's answer, or come after it."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.close_gate()
            stage.journal.answer_first = answer_first
            await stage.say("before")
            tail.doubt()
            await stage.journal.arrived.wait()
            await stage.say("during", "during too")
            await stage.say("last")
            stage.journal.gate.set()
            await stage.settled()
            assert held(tail) == ["before", "during", "during too", "last"]

    asyncio.run(test())


def test_old_hints_behind_a_new_beginning_cost_one_more_read_not_one_each(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.withheld = hints = []
            for n in range(50):
                await stage.say(str(n))
            tail.known = False
            stage.journal.close_gate()
            tail.doubt()
            await stage.journal.arrived.wait()
            stage.journal.withheld = None
            stage.journal.tell(*hints)
            reads = stage.journal.reads
            stage.journal.gate.set()
            await stage.settled()
            assert stage.journal.reads - reads <= 2

    asyncio.run(test())


def test_more_hints_than_are_kept_during_a_read_are_read_from_the_journal(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.close_gate()
            stage.journal.answer_first = True
            tail.doubt()
            await stage.journal.arrived.wait()
            for n in range(300):
                await stage.say(str(n))
            assert len(tail._unsettled) <= 256
            stage.journal.gate.set()
            await stage.settled()
            assert held(tail) == [str(n) for n in range(300)]

    asyncio.run(test())


def test_a_tail_asks_a_journal_that_fails_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.journal.failing = 1
            stage.tails.acquire("s")
            await stage.settled()
            assert stage.journal.failing == 0

    asyncio.run(test())


def test_a_tail_that_was_never_told_that_it_is_followed_asks_by_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.journal.on_doubt = lambda stream: None
            tail = stage.tails.acquire("s")
            tail.active_at = -1e9
            await stage.tails.check_quiet()
            await stage.settled()

    asyncio.run(test())


def test_a_stream_too_far_ahead_is_joined_at_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            stage.journal.withheld = []
            await stage.say(*(str(n) for n in range(600)))
            await stage.say(*(str(n) for n in range(600)))
            tail.doubt()
            await stage.settled()
            assert (held(tail), tail.generation) == ([], 0)

    asyncio.run(test())


def test_a_stream_made_anew_is_another_generation(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", "b")
            stage.journal.on_deleted = lambda stream: None
            await stage.journal.delete("s")
            await stage.open()
            await stage.settled()
            assert tail.generation > 0
            assert not tail.deleted
            assert tail.next_chunk(VIEW, ORIGIN) is None or "a" not in held(tail)

    asyncio.run(test())


def test_a_stream_that_was_sealed_when_it_was_made_is_known_to_finish(tmp_path: Path) -> None:
    """The tail waited for the stream, and no frame tells that it was made sealed."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = stage.tails.acquire("s")
            await stage.settled()
            assert tail.top == ORIGIN
            await stage.open(seal=True)
            await stage.settled()
            assert not tail.finished
            await stage.say("a", end=True)
            await stage.settled()
            assert tail.finished

    asyncio.run(test())


@pytest.mark.parametrize("seal", [False, True])
def test_a_tail_that_was_told_of_its_streams_making_asks_nothing(tmp_path: Path, seal: bool) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            stage.tails.expect("s")
            opened = await stage.open(seal=seal)
            started = Frame(*opened.first, "r", CONTROL_EVENT, run_started("r", None, None))
            stage.tails.opened("s", started, seal)
            tail = stage.tails.acquire("s")
            assert tail.next_chunk(VIEW, opened.start) is not None
            assert (tail.top, tail.sealed, tail.run_is_open("r")) == (opened.last, seal, True)
            await stage.say("a", "b")
            await stage.settled()
            assert held(tail) == ["a", "b"]
            await stage.say("c", end=True)
            await stage.settled()
            assert (held(tail), tail.finished) == (["a", "b", "c"], seal)
            assert stage.journal.reads == 0

    asyncio.run(test())


def test_a_tail_that_waits_to_be_told_asks_when_it_is_read_before(tmp_path: Path) -> None:
    """The opening may fail, or be of a stream that has frames already."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.tails.expect("s")
            await stage.say("a")
            await stage.until(lambda: True)
            assert stage.journal.reads == 0
            tail = stage.tails.acquire("s")
            await stage.settled()
            assert stage.journal.reads == 1
            await stage.say("b")
            await stage.settled()
            assert held(tail) == ["b"]
            late = Frame(1, tail.top.ms, "other", CONTROL_EVENT, run_started("other", None, None))
            stage.tails.opened("s", late, True)
            assert (held(tail), tail.sealed) == (["b"], False)

    asyncio.run(test())


def test_frames_that_were_missed_before_a_tail_was_told_are_found_with_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            stage.tails.expect("s")
            opened = await stage.open()
            stage.journal.withheld = []
            await stage.say("missed")
            stage.journal.withheld = None
            started = Frame(*opened.first, "r", CONTROL_EVENT, run_started("r", None, None))
            stage.tails.opened("s", started, False)
            tail = stage.tails.acquire("s")
            await stage.say("heard")
            await stage.settled()
            assert held(tail) == ["missed", "heard"]

    asyncio.run(test())


def test_a_tail_that_nobody_comes_to_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.replay.tail.LINGER_S", 0.0)

    async def test() -> None:
        async with staged(tmp_path) as stage:
            stage.tails.expect("s")
            assert len(stage.tails) == 1
            await stage.until(lambda: not len(stage.tails))
            assert await stage.journal.watchers("s") == 0

    asyncio.run(test())


def test_a_tail_hears_that_its_stream_was_sealed(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", end=True)
            await stage.settled()
            assert not tail.finished
            tail.wait(sleeping := Sleeping())
            await stage.journal.seal("s")
            await sleeping.woken.wait()
            assert tail.finished

    asyncio.run(test())


def test_a_tail_that_was_not_told_of_sealing_finds_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", end=True)
            await stage.settled()
            stage.journal.on_sealed = lambda stream: None
            await stage.journal.seal("s")
            tail.active_at = -1e9
            await stage.tails.check_quiet()
            await stage.settled()
            assert tail.finished

    asyncio.run(test())


def test_a_tail_that_missed_a_run_is_not_finished_by_hearing_of_the_sealing(tmp_path: Path) -> None:
    """Readers would be told that there is no more, and never come back for it."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", end=True)
            await stage.settled()
            stage.journal.withheld = []
            await stage.open(run="another")
            await stage.journal.seal("s")
            await stage.until(lambda: tail.sealed)
            assert (tail.finished, tail.run_is_open("another")) == (False, True)

    asyncio.run(test())


def test_a_tail_believes_the_journal_and_not_a_late_word_of_sealing(tmp_path: Path) -> None:
    """It may be of before the journal was rewound."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", end=True)
            await stage.settled()
            stage.journal.on_sealed("s")
            await stage.settled()
            assert (tail.sealed, tail.finished) == (False, False)

    asyncio.run(test())


def test_a_tail_knows_which_runs_are_open(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = stage.tails.acquire("s")
            assert tail.run_is_open("r") is None
            await stage.open()
            await stage.settled()
            assert (tail.run_is_open("r"), tail.run_is_open("other")) == (True, False)
            await stage.say("a", end=True)
            await stage.settled()
            assert tail.run_is_open("r") is False

    asyncio.run(test())


def test_p8_a_journal_that_gets_back_what_it_lost_resets_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, rewind_grace_s=3600) as stage:
            tail = await followed(stage)
            await stage.say("a")
            await stage.settled()
            stage.journal.lost_after = tail.top
            await stage.say("b", "c")
            reads = stage.journal.reads
            tail.doubt()
            await stage.until(lambda: stage.journal.reads >= reads + 3)
            stage.journal.lost_after = None
            await stage.settled()
            assert (held(tail), tail.generation) == (["a", "b", "c"], 0)

    asyncio.run(test())


def test_p8_a_journal_that_gets_nothing_back_is_another_generation(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, rewind_grace_s=0.1) as stage:
            tail = await followed(stage)
            await stage.say("a")
            await stage.settled()
            stage.journal.lost_after = before = tail.top
            await stage.say("b", "c")
            tail.doubt()
            await stage.until(lambda: tail.generation == 1)
            assert (held(tail), tail.top) == ([], before)

    asyncio.run(test())


def test_p6_the_ring_holds_no_more_than_its_bounds(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, ring_max_frames=20, ring_max_bytes=2000) as stage:
            tail = await followed(stage)
            for n in range(100):
                await stage.say(f"{n:03d}")
                assert len(tail._frames) <= 20
            await stage.settled()
            assert held(tail)[-1] == "099"
            for n in range(100):
                await stage.say(f"{n:03d}" + "x" * 300)
                assert tail._bytes <= 2000
            await stage.settled()
            assert tail._bytes == sum(map(len, tail._wires)) == stage.tails.held_bytes
            tail.close()
            assert stage.tails.held_bytes == 0

    asyncio.run(test())


def test_p6_readers_at_many_positions_do_not_make_the_tail_grow(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, ring_max_bytes=20_000) as stage:
            tail = await followed(stage)
            for n in range(100):
                await stage.say(f"{n:03d}" + "x" * 100)
            await stage.settled()
            for frame in list(tail._frames):
                tail.next_chunk(VIEW, frame.id)
                assert stage.tails.held_bytes <= 2 * 20_000
            shared = tail.next_chunk(VIEW, tail._frames[-2].id)
            assert shared is tail.next_chunk(EventsView(None, "none", False, True), tail._frames[-2].id)
            await stage.say("more")
            await stage.settled()
            assert stage.tails.held_bytes == tail._bytes

    asyncio.run(test())


def test_p6_the_process_bound_is_kept_by_quiet_streams_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path, rings_max_bytes=10_000) as stage:
            for n in range(20):
                stream = f"s{n}"
                await stage.open(stream)
                stage.tails.acquire(stream)
                await stage.settled(stream)
                await stage.say("x" * 1500, stream=stream)
                await stage.settled(stream)
                assert stage.tails.held_bytes <= 10_000
            assert held(stage.tails._tails["s19"]) == ["x" * 1500]
            quiet = stage.tails._tails["s0"]
            assert held(quiet) == []
            assert quiet._floor == quiet.top

    asyncio.run(test())


def test_p6_who_waits_no_more_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            for _ in range(5):
                sleeper = Sleeping()
                assert stage.tails.acquire("s") is tail
                tail.wait(sleeper)
                stage.tails.release(tail, sleeper)
            assert tail._waiting == set()
            assert tail.readers == 1

    asyncio.run(test())


def test_news_wakes_who_waits_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            sleeper = Sleeping()
            tail.wait(sleeper)
            await stage.say("a")
            await sleeper.woken.wait()
            assert tail._waiting == set()

    asyncio.run(test())


def test_a_deleted_tail_is_let_go_and_the_next_reader_gets_a_new_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            sleeper = Sleeping()
            tail.wait(sleeper)
            await stage.journal.delete("s")
            await sleeper.woken.wait()
            assert tail.deleted
            assert len(stage.tails) == 0
            tail.doubt()
            assert tail._settling is None
            stage.tails.release(tail, Nobody())
            assert stage.tails.acquire("s") is not tail

    asyncio.run(test())


def test_an_idle_tail_is_kept_for_a_while_and_then_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.replay.tail.LINGER_S", 0.0)

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a")
            await stage.settled()
            assert stage.tails.readers_of("s") == 1
            stage.tails.release(tail, Nobody())
            assert stage.tails.acquire("s") is tail
            stage.tails.release(tail, Nobody())
            dropped = asyncio.Event()
            unwatch = stage.journal.real.unwatch
            stage.journal.unwatch = lambda stream: (unwatch(stream), dropped.set())
            await dropped.wait()
            assert len(stage.tails) == 0
            assert stage.tails.held_bytes == 0
            assert "s" not in stage.journal.real._watched

    asyncio.run(test())


def test_a_position_that_the_tail_does_not_hold_is_not_served(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            await stage.say("a", "b")
            await stage.settled()
            first = tail._frames[0].id
            found = tail.next_chunk(VIEW, first)
            assert found is not None
            assert found.last == tail.top
            assert tail.next_chunk(VIEW, tail.top) is None
            assert tail.next_chunk(VIEW, Cursor(first.seq, first.ms + 1)) is None
            assert tail.next_chunk(VIEW, Cursor(99, first.ms)) is None

    asyncio.run(test())


def test_a_stream_that_was_quiet_for_long_is_checked_rarely_until_it_speaks_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            tail.active_at = -1e9
            await stage.tails.check_quiet()
            next_check = tail.check_at
            assert next_check > stage.tails.now() + stage.tails.settings.quiet_check_s
            tail.doubt = None  # type: ignore[assignment, method-assign]
            stage.tails.journal.tops = None  # type: ignore[assignment, method-assign]
            await stage.tails.check_quiet()  # asks nobody
            assert tail.check_at == next_check
            del tail.doubt
            await stage.say("a")
            await stage.until(lambda: tail.top.seq == 2)
            assert tail.check_at <= stage.tails.now()

    asyncio.run(test())


@pytest.mark.parametrize(("ahead_s", "least_s", "most_s"), [(3600, 0, 0), (-3600, 3600, 3700)])
def test_the_delay_of_a_flush_is_that_of_its_oldest_frame_and_never_negative(
    tmp_path: Path, ahead_s: int, least_s: int, most_s: int
) -> None:
    """The journal's clock may be ahead of this host's."""

    async def test() -> None:
        async with staged(tmp_path) as stage:
            tail = await followed(stage)
            delays = stage.tails.counts.delivery_delay
            delays.clear()
            oldest = time.time_ns() // 1_000_000 + ahead_s * 1000
            frames = [Frame(tail.top.seq + 1 + n, oldest + n * 1_000_000, "r", "", b"word") for n in range(2)]
            tail.on_frames(tail.top, frames)
            tail._flush()
            assert sum(delays.counts) == 1
            assert least_s <= delays.total <= most_s

    asyncio.run(test())
