"""What this process learns of its runs: at once, at the next check, and what it does about it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from anybody import ANYBODY
from audience import Audience
from deaf_follower import DeafFollower
from redis_server import RedisServer
from rewinding import Rewinding, rewinding
from scripted_upstream import Exchange, ScriptedUpstream

from relay.errors import JournalUnavailable, RunExists
from relay.frame import Event, Frame, is_terminal
from relay.ingest.owned import COMPARED_EVERY, OwnedRuns
from relay.ingest.proxy import Call, Proxy, RunAnswer, RunWishes
from relay.ingest.pump import FINISH_MAX_BYTES, Pump
from relay.ingest.upstream import Upstream, UpstreamRequest
from relay.ingest.writer import RunWriter
from relay.journal.base import Append, Appended, Retention, RunOpening
from relay.journal.redis_streams import RedisJournal
from relay.lifecycle import Ending, Reason, ending
from relay.settings import Settings

KINDS = pytest.mark.parametrize("kind", ["sqlite", "redis"])
CHUNK = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'
CANCELLED = ending(Reason.CLIENT_CANCEL, "Stop was pressed.")
DEADLINE_S = 30


class Ours:
    """The owned runs of one process, and what it counted. `deaf` loses every hint."""

    def __init__(self, deaf: bool = False, **settings: Any) -> None:
        # However slow the host is: what is held is not forgotten, and what is put back is waited for.
        patient = {"held_s": 3600, "rewind_grace_s": 3600}
        self.settings = Settings(**{"drain_grace_s": 0, **patient, **settings})
        self.counted: list[tuple[str, str]] = []
        self.runs = OwnedRuns(self.settings, self._count)
        self.name = self.runs.name
        self._deaf = deaf

    def on_run_over(self, stream: str, run: str) -> None:
        if not self._deaf:
            self.runs.on_run_over(stream, run)

    def _count(self, stream: str, run: str, end: Ending, *_: object) -> None:
        self.counted.append((run, end.reason))

    async def begun(self, journal: Any, run: str, over: Callable[[], None] = lambda: None) -> RunWriter:
        """A run of stream `s`, held and opened."""
        opening = RunOpening("s", run, "w-" + run, "t" * 22, Retention(), owner=self.name)
        writer = RunWriter(journal, opening, self.settings, self.runs.memory)
        self.runs.add(writer, over)
        writer.opened(await journal.open_run(opening))
        return writer

    async def check(self, journal: Any, times: int = 1) -> None:
        """As the lease is renewed: nothing is put back any more when it is over."""
        for _ in range(times):
            await self.runs.check(journal)
            await asyncio.gather(*self.runs._putting_back.values())


async def said(writer: RunWriter, *words: str, end: Ending | None = None) -> None:
    for word in words:
        await writer.append([Event("", word.encode())], len(word))
    if end is not None:
        await writer.append([], 0, "", end)


@contextlib.asynccontextmanager
async def elsewhere(journal: Rewinding) -> AsyncIterator[Any]:
    """The same journal as another process has it; that of SQLite belongs to one process."""
    if not isinstance(journal.inner, RedisJournal):
        yield journal
        return
    other = RedisJournal(journal.inner._url, prefix=journal.inner._prefix)
    await other.start(DeafFollower(), OwnedRuns(Settings(), lambda *_: None))
    yield other
    await other.close()


# --- over, by somebody else's hand ----------------------------------------------------------------------


class Served:
    """A proxy in front of an upstream that speaks until its connection is closed."""

    def __init__(self, ours: Ours, journal: Any, upstream: ScriptedUpstream, name: str) -> None:
        self.ours, self.journal, self.upstream, self.name = ours, journal, upstream, name
        self.closed = asyncio.Event()
        self.gate = upstream.gate()

    async def __aenter__(self) -> Served:
        loop = asyncio.get_running_loop()

        async def handler(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(b"data: one\n\n")
            await exchange.closed()
            loop.call_soon_threadsafe(self.closed.set)

        self.upstream.on(f"/{self.name}", handler)
        self._backend = Upstream(self.upstream.url, self.ours.settings)
        await self._backend.start()
        self.audience = Audience(1)
        self.proxy = Proxy(
            self._backend,
            self.journal,
            self.ours.settings,
            self.ours.runs,
            self.audience,
            self.ours._count,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.proxy.drain()
        await self._backend.close()

    async def open(self, *headers: tuple[bytes, bytes], heard: bool = True) -> RunAnswer:
        """A run in stream `s`; when `heard`, one frame of it is journaled."""
        sent = [(b"host", b"relay"), (b"relay-stream", b"s"), *headers]
        path = f"/{self.name}"
        call = Call("GET", path, path, sent, None, ANYBODY)
        answer = await self.proxy.open(call)
        assert isinstance(answer, RunAnswer)
        assert answer.pump is not None
        if heard:
            await self._heard(answer.pump)
        return answer

    async def start(self, run: str) -> Pump:
        """The pump of a run in stream `s`, named by who asks for it; one frame of it is journaled."""
        request = UpstreamRequest("GET", f"/{self.name}", [(b"host", b"relay")], None)
        await self.proxy.start_run("s", request, RunWishes(run=run))
        pump = self.proxy.pump("s", run)
        assert pump is not None
        await self._heard(pump)
        return pump

    async def _heard(self, pump: Pump) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while pump.writer.next_seq == 1:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def words(frames: list[Frame], run: str) -> list[str]:
    """A run's data, and the kinds of its control frames."""
    return [
        frame.data.decode() if not frame.is_control else frame.data.split(b'"')[3].decode()
        for frame in frames
        if frame.run == run
    ]


@KINDS
@pytest.mark.parametrize("hint", ["heard", "lost"])
@pytest.mark.parametrize("act", ["cancel", "take over"])
def test_p4_p7_a_run_that_is_over_elsewhere_has_its_upstream_closed_and_says_nothing_more(
    kind: str, hint: str, act: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream,
    name: str,
) -> None:  # fmt: skip
    async def check() -> None:
        ours = Ours(deaf=hint == "lost")
        async with rewinding(kind, tmp_path, redis_server, ours) as journal, elsewhere(journal) as other:
            async with Served(ours, journal, upstream, name) as served:
                run = (await served.open()).run
                if act == "cancel":
                    assert (await other.end_run("s", run, CANCELLED, {})).by_this
                else:
                    await other.take_over("s", run, "another writer", 60)
                if hint == "lost":
                    assert not served.closed.is_set()
                    await ours.check(journal, 2)  # the first one saw it speak
                async with asyncio.timeout(DEADLINE_S):
                    await served.closed.wait()
            frames = await journal.frames("s")
            over = ["run.ended"] if act == "cancel" else []
            assert words(frames, run) == ["run.started", "one", *over]
            assert (await journal.run("s", run)).status == ("cancelled" if act == "cancel" else "open")
            assert ours.counted == [], "whoever ended it counts it"
            assert ours.runs.memory.bytes == 0

    asyncio.run(check())


@KINDS
def test_p3_a_cancel_and_a_natural_end_at_one_time_make_one_ending(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal, elsewhere(journal) as other:
            async with Served(ours, journal, upstream, name) as served:
                upstream.on_stream(f"/{name}", [b"data: one\n\n"])
                outcomes = set()
                for n in range(40):
                    answer = await served.open()
                    await asyncio.sleep(n % 4 * 0.001)
                    ended = await other.end_run("s", answer.run, CANCELLED, {})
                    outcomes.add((ended.by_this, ended.status))
                assert outcomes <= {(True, "cancelled"), (False, "completed")}
            frames = await journal.frames("s")
            terminals = [frame.run for frame in frames if is_terminal(frame)]
            assert len(terminals) == len(set(terminals)) == 40
            completed = [run for run in terminals if (await journal.run("s", run)).status == "completed"]
            assert ours.counted == [(run, "upstream_end") for run in completed]

    asyncio.run(check())


@KINDS
def test_p4_a_cancel_that_comes_before_a_terminal_marker_is_journaled_wins_and_closes_upstream(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """What upstream would still do after its last word is done for nobody."""

    async def check() -> None:
        ours, loop = Ours(), asyncio.get_running_loop()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal, elsewhere(journal) as other:
            async with Served(ours, journal, upstream, name) as served:

                async def handler(exchange: Exchange) -> None:
                    await exchange.head()
                    await exchange.chunk(CHUNK)
                    await exchange.chunk(b"data: [DONE]\n\n")
                    await exchange.closed()
                    loop.call_soon_threadsafe(served.closed.set)

                append = journal.inner.append

                async def overtaken(batch: Append) -> Appended:
                    if batch.ending is not None:
                        assert (await other.end_run(batch.stream, batch.run, CANCELLED, {})).by_this
                    return await append(batch)

                upstream.on(f"/{name}", handler)
                journal.inner.append = overtaken
                run = (await served.open(heard=False)).run
                async with asyncio.timeout(DEADLINE_S):
                    await served.closed.wait()
            assert (await journal.run("s", run)).status == "cancelled"
            assert words(await journal.frames("s"), run)[-1] == "run.ended"
            assert ours.counted == []

    asyncio.run(check())


@KINDS
def test_p4_a_superseded_run_gives_way_and_tells_what_stood_after_it(
    kind: str,
    tmp_path: Path,
    redis_server: RedisServer,
    upstream: ScriptedUpstream,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            async with Served(ours, journal, upstream, name) as served:
                old = await served.open()
                between = await served.open()
                served.closed.clear()
                new = await served.open((b"relay-supersedes", old.run.encode()))
                async with asyncio.timeout(DEADLINE_S):
                    await served.closed.wait()
                head = dict(new.headers)
                assert int(head[b"relay-frames-after"]) >= 2
                assert ours.counted == [(old.run, "superseded")]
                assert (await journal.run("s", between.run)).status == "open"
            frames = await journal.frames("s")
            assert words(frames, old.run) == ["run.started", "one", "run.superseded", "run.ended"]
            assert b"relay-supersedes" not in [key for key, _ in upstream.received[-1].headers]
            said_so = [
                record.getMessage() for record in caplog.records if "at or after" in record.getMessage()
            ]
            assert len(said_so) == 1
            assert old.run in said_so[0]
            assert between.run in said_so[0]

    asyncio.run(check())


@KINDS
def test_p4_a_run_whose_name_is_asked_for_again_is_held_as_before(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal, elsewhere(journal) as other:
            async with Served(ours, journal, upstream, name) as served:
                await served.start("mine")
                with pytest.raises(RunExists):
                    await served.start("mine")
                ours.runs.doubt()
                await ours.check(journal)
                assert (await journal.run("s", "mine")).status == "open"
                assert (await other.end_run("s", "mine", CANCELLED, {})).by_this
                async with asyncio.timeout(DEADLINE_S):
                    await served.closed.wait()
            assert ours.counted == []

    asyncio.run(check())


@KINDS
def test_p3_an_ending_that_waits_for_the_journal_is_kept_when_its_runs_name_is_asked_for_again(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours(journal_deadline_s=0.01, journal_timeout_s=0.01)
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            async with Served(ours, journal, upstream, name) as served:
                pump = await served.start("mine")

                async def away(*_: Any) -> Any:
                    raise JournalUnavailable("away")

                inner = journal.inner
                real, inner.append, inner.open_run = (inner.append, inner.open_run), away, away
                pump.stop(ending(Reason.MAX_RUN, "It was open for too long."))
                async with asyncio.timeout(DEADLINE_S):
                    while served.proxy.open_runs:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                with pytest.raises(JournalUnavailable):
                    await served.start("mine")
                inner.append, inner.open_run = real
                await served.proxy.visit()
            assert (await journal.run("s", "mine")).reason == "max_run"
            assert ours.counted == [("mine", "max_run")]

    asyncio.run(check())


@KINDS
def test_p3_a_run_of_whose_opening_the_journal_said_nothing_is_ended_and_counted(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours()
        async with (
            rewinding(kind, tmp_path, redis_server, ours) as journal,
            Served(ours, journal, upstream, name) as served,
        ):
            open_run = journal.inner.open_run

            async def unanswered(opening: RunOpening) -> Any:
                await open_run(opening)
                raise JournalUnavailable("no answer")

            journal.inner.open_run = unanswered
            with pytest.raises(JournalUnavailable):
                await served.open()
            (run,) = await journal.runs("s", "", 10)
            assert (run.status, ours.counted) == ("open", [])
            for _ in range(2):
                await served.proxy.visit()
            assert (await journal.run("s", run.run)).reason == "journal_lost"
            assert ours.counted == [(run.run, "journal_lost")]

    asyncio.run(check())


@KINDS
def test_an_upstream_that_said_its_last_word_may_finish_though_its_run_was_found_over_meanwhile(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """The ending that was found is the one that is just being written."""

    async def check() -> None:
        ours, loop = Ours(), asyncio.get_running_loop()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            async with Served(ours, journal, upstream, name) as served:

                async def handler(exchange: Exchange) -> None:
                    await exchange.head()
                    await exchange.chunk(CHUNK)
                    await exchange.chunk(b"data: [DONE]\n\n")
                    with contextlib.suppress(ConnectionError):
                        await exchange.chunk(b":" * 2 * FINISH_MAX_BYTES)
                    await exchange.closed()
                    loop.call_soon_threadsafe(served.closed.set)

                append = journal.inner.append

                async def found_over(batch: Append) -> Appended:
                    appended: Appended = await append(batch)
                    if batch.ending is not None:
                        ours.on_run_over(batch.stream, batch.run)
                    return appended

                upstream.on(f"/{name}", handler)
                journal.inner.append = found_over
                run = (await served.open(heard=False)).run
                async with asyncio.timeout(DEADLINE_S):
                    await served.closed.wait()
            assert ours.counted == [(run, "upstream_end")]

    asyncio.run(check())


@KINDS
def test_p3_a_mistake_in_writing_an_ending_leaves_no_client_waiting_and_no_other_ending(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            async with Served(ours, journal, upstream, name) as served:
                pump = (await served.open()).pump
                assert pump is not None
                append = journal.inner.append

                async def mistaken(batch: Append) -> Appended:
                    raise ZeroDivisionError

                journal.inner.append = mistaken
                pump.stop(ending(Reason.MAX_RUN))
                async with asyncio.timeout(DEADLINE_S):
                    while served.proxy.open_runs:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                assert pump.broken
                journal.inner.append = append
                ours.runs.doubt()
                await ours.check(journal)
                if kind == "redis":  # that of SQLite lists none, and ends it when it is started again
                    assert (await journal.run("s", pump.writer.run)).reason == "owner_lost"
            assert ours.runs._runs == {}

    asyncio.run(check())


@KINDS
def test_a_run_that_is_being_opened_when_relay_shuts_down_has_the_grace_of_the_others(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours, gate, asked = Ours(drain_grace_s=DEADLINE_S), asyncio.Event(), asyncio.Event()
        async with (
            rewinding(kind, tmp_path, redis_server, ours) as journal,
            Served(ours, journal, upstream, name) as served,
        ):
            said = upstream.gate()

            async def handler(exchange: Exchange) -> None:
                await exchange.head()
                await said.wait()
                await exchange.chunk(b"data: one\n\n")
                await exchange.end()

            upstream.on(f"/{name}", handler)
            open_run = journal.inner.open_run

            async def slow(opening: RunOpening) -> Any:
                asked.set()
                await gate.wait()
                return await open_run(opening)

            journal.inner.open_run = slow
            opening = asyncio.create_task(served.open(heard=False))
            await asked.wait()
            draining = asyncio.create_task(served.proxy.drain())
            await asyncio.sleep(0)
            gate.set()
            run = (await opening).run
            said.open()
            await draining
            assert ours.counted == [(run, "upstream_end")]

    asyncio.run(check())


@KINDS
def test_while_the_journal_is_away_it_is_asked_for_one_run_and_not_for_each(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """Each question may take as long as the journal is given to answer."""

    async def check() -> None:
        ours, asked = Ours(abandon_s=0.001), 0
        async with (
            rewinding(kind, tmp_path, redis_server, ours) as journal,
            Served(ours, journal, upstream, name) as served,
        ):
            served.audience.readers = 0
            for _ in range(3):
                await served.open()
            watchers = journal.inner.watchers

            async def away(stream: str) -> int:
                nonlocal asked
                asked += 1
                raise JournalUnavailable("away")

            journal.inner.watchers = away
            await served.proxy.visit()
            assert (asked, served.proxy.open_runs) == (1, 3)
            journal.inner.watchers = watchers
            async with asyncio.timeout(DEADLINE_S):
                while served.proxy.open_runs:
                    await served.proxy.visit()
                    await asyncio.sleep(0.005)
            assert [reason for _, reason in ours.counted] == ["abandoned"] * 3

    asyncio.run(check())


@KINDS
def test_p7_a_run_whose_reader_comes_while_it_is_asked_for_readers_elsewhere_is_not_abandoned(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours, asked = Ours(abandon_s=0.001), 0
        async with (
            rewinding(kind, tmp_path, redis_server, ours) as journal,
            Served(ours, journal, upstream, name) as served,
        ):
            served.audience.readers = 0
            pump = (await served.open()).pump
            assert pump is not None

            async def watchers(stream: str) -> int:
                nonlocal asked
                asked += 1
                served.audience.readers = 1  # who has just come is not among them yet
                return 0

            journal.inner.watchers = watchers
            pump.read_at -= 1000
            for _ in range(2):
                await served.proxy.visit()
            assert (asked, served.proxy.open_runs, pump._stopped) == (1, 1, None)

    asyncio.run(check())


@KINDS
def test_a_run_that_was_taken_over_has_a_greatest_age_all_the_same(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def check() -> None:
        ours = Ours(max_run_s=0.001)
        async with (
            rewinding(kind, tmp_path, redis_server, ours) as journal,
            Served(ours, journal, upstream, name) as served,
        ):
            run = (await served.open()).run
            assert await journal.end_due("s", run, 0, {}) is None, "it is its owner's to end"
            await journal.take_over("s", run, "another writer", 60)
            async with asyncio.timeout(DEADLINE_S):
                while (ended := await journal.end_due("s", run, 0, {})) is None:
                    pass
            assert ended.reason == "max_run"

    asyncio.run(check())


# --- forgotten ------------------------------------------------------------------------------------------


def test_p3_a_run_that_the_journal_takes_for_ours_and_nobody_holds_is_ended(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """But not one that is being opened, nor one whose ending waits. SQLite's journal lists none: what it
    accepted it keeps, and nobody else writes there."""

    async def check() -> None:
        ours = Ours()
        async with rewinding("redis", tmp_path, redis_server, ours) as journal:
            orphan = await ours.begun(journal, "orphan")
            ours.runs.discard(orphan)
            await ours.begun(journal, "held")
            opening = RunOpening("s", "opening", "w", "t" * 22, Retention(), owner=ours.name)
            ours.runs.add(RunWriter(journal, opening, ours.settings, ours.runs.memory), lambda: None)
            await journal.open_run(opening)  # its answer has not come yet
            ours.runs.doubt()
            await ours.check(journal)
            assert ours.counted == [("orphan", "owner_lost")]
            assert [run.status for run in await journal.runs("s", "", 10)] == ["lost", "open", "open"]
            assert set(await journal.owned(ours.name, 10)) == {("s", "held"), ("s", "opening")}

    asyncio.run(check())


@KINDS
def test_orphans_are_looked_for_from_time_to_time_and_after_the_journal_was_away(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            await ours.begun(journal, "r")
            asked = 0
            real = journal.inner.owned

            async def owned(owner: str, limit: int) -> Any:
                nonlocal asked
                asked += 1
                return await real(owner, limit)

            async def away(runs: Any) -> Any:
                raise JournalUnavailable("away")

            journal.inner.owned = owned
            await ours.check(journal, COMPARED_EVERY - 1)
            assert asked == 0
            await ours.check(journal)
            assert asked == 1
            states, journal.inner.states = journal.inner.states, away
            with pytest.raises(JournalUnavailable):
                await ours.check(journal)
            journal.inner.states = states
            await ours.check(journal)
            assert asked == 2

    asyncio.run(check())


@KINDS
def test_p2_p3_a_silent_run_and_a_lost_ending_are_put_back_under_their_ids(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        ours = Ours()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            silent = await ours.begun(journal, "silent")
            await journal.remember()
            ended = await ours.begun(journal, "ended")
            await said(ended, "one")
            await said(silent, "two")
            await said(ended, "three", end=ending(Reason.UPSTREAM_ERROR, "no"))
            ours.runs.discard(ended)
            held = await journal.frames("s")
            await ours.check(journal)
            await journal.rewind()
            await ours.check(journal)
            assert await journal.frames("s") == held
            run = await journal.run("s", "ended")
            assert (run.status, run.reason, run.error, run.frames) == ("failed", "upstream_error", "no", 2)
            assert ours.counted == []
            await said(silent, "four", end=ending(Reason.UPSTREAM_END))
            assert words(await journal.frames("s"), "silent") == ["run.started", "two", "four", "run.ended"]

    asyncio.run(check())


@KINDS
def test_p3_a_silent_run_that_cannot_be_put_back_is_ended(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        ours = Ours(held_max_bytes=300)
        over = asyncio.Event()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            writer = await ours.begun(journal, "r", over.set)
            await journal.remember()
            await said(writer, "one", "two")
            await ours.check(journal)
            await journal.rewind()
            await ours.check(journal)
            run = await journal.run("s", "r")
            assert (run.status, run.reason) == ("lost", "journal_lost")
            assert over.is_set()
            assert ours.counted == [("r", "journal_lost")]

    asyncio.run(check())


@KINDS
def test_p8_what_was_deleted_is_not_put_back(kind: str, tmp_path: Path, redis_server: RedisServer) -> None:
    async def check() -> None:
        ours = Ours(deaf=True)
        over = asyncio.Event()
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            writer = await ours.begun(journal, "open", over.set)
            ended = await ours.begun(journal, "ended")
            await said(ended, "two", end=ending(Reason.UPSTREAM_END))
            ours.runs.discard(ended)
            await said(writer, "one")
            await ours.check(journal)
            await journal.delete("s")
            await ours.check(journal)
            assert over.is_set()
            assert "s" not in await journal.tops(["s"])

    asyncio.run(check())


@KINDS
def test_an_ended_run_is_held_for_a_while_and_then_forgotten(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        ours = Ours(held_s=0.05)
        async with rewinding(kind, tmp_path, redis_server, ours) as journal:
            writer = await ours.begun(journal, "r")
            await said(writer, "one", end=ending(Reason.UPSTREAM_END))
            ours.runs.discard(writer)
            assert len(ours.runs._runs) == 1
            async with asyncio.timeout(DEADLINE_S):
                while ours.runs._runs:
                    await ours.check(journal)
            assert ours.runs.memory.bytes == 0
            assert ours.runs.memory.writers("s") == ()

    asyncio.run(check())
