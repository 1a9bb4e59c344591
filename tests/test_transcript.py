"""The transcript of a run: what its frames showed, of both journals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from own_journal import own_journal

from relay.cursor import ORIGIN
from relay.dialects.detect import OPENAI_CHAT
from relay.errors import UnknownRun, UnknownStream
from relay.frame import Event
from relay.journal.base import Append, Journal, RunOpening
from relay.lifecycle import Ending, Reason, ending
from relay.limits import PAGE_MAX_FRAMES, Retention
from relay.transcript import Assembly, Transcript, read_transcript

ROOMY = 1024 * 1024
COMPLETED = ending(Reason.PRODUCER_END)

Play = Callable[[Journal], Awaitable[Any]]
Perform = Callable[[Play], Any]


@pytest.fixture
def perform(fresh_journal: Callable[[], str], name: str) -> Perform:
    """Runs a test's play on a journal of each kind."""

    async def opened(play: Play) -> Any:
        async with asyncio.timeout(60), own_journal(fresh_journal(), name) as journal:
            return await play(journal)

    return lambda play: asyncio.run(opened(play))


async def begin(journal: Journal, run: str = "r", **opening: Any) -> None:
    await journal.open_run(RunOpening("s", run, f"writer-{run}", f"token-{run}", Retention(), **opening))


async def say(
    journal: Journal, seq: int, *words: str, run: str = "r", end: Ending | None = None, **batch: Any
) -> None:
    """Frames of a raw run, and perhaps its ending."""
    events = [Event("", word.encode()) for word in words]
    text_bytes = sum(len(event.data) for event in events)
    await journal.append(
        Append("s", run, f"writer-{run}", seq, events, **({"text_bytes": text_bytes} | batch), ending=end)
    )


def chunk(*deltas: dict[str, Any]) -> Event:
    choices = [{"index": delta.pop("index", 0), "delta": delta} for delta in deltas]
    return Event("", orjson.dumps({"object": "chat.completion.chunk", "choices": choices}))


async def chat(journal: Journal, *events: Event, end: Ending | None = None, **batch: Any) -> None:
    """An answer in the format of chat completions, as the pump journals it."""
    text_bytes = sum(OPENAI_CHAT.read(event).text_bytes for event in events)
    await journal.append(
        Append("s", "r", "writer-r", 1, events, text_bytes, "openai-chat", ending=end, **batch)
    )


async def transcript(journal: Journal, run: str = "r", max_bytes: int = ROOMY) -> Transcript:
    return await read_transcript(journal, "s", run, max_bytes)


def parts(said: Transcript) -> list[tuple[str, int, str]]:
    return [(part.kind, part.index, part.text) for part in said.parts]


def test_parts_come_in_the_order_they_appeared_and_their_text_is_all_the_run_counted(
    perform: Perform,
) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await chat(
            journal,
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "o", "index": 1}, {"content": "hé"}),
            chunk({"content": "llo", "refusal": "no"}),
            chunk({"content": "k", "index": 1}),
            Event("", b"[DONE]"),
            end=ending(Reason.UPSTREAM_END),
        )
        said = await transcript(journal)
        assert parts(said) == [("text", 1, "ok"), ("text", 0, "héllo"), ("refusal", 0, "no")]
        assert said.text == "okhéllono"
        assert len(said.text.encode()) == said.info.text_bytes
        assert not said.truncated

    perform(play)


def test_the_document_says_how_the_run_ended_and_where_its_frames_are(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal, run="before")
        await begin(journal, metadata='{"user":7}', dialect="raw")
        await say(journal, 1, "a", run="before")
        await say(journal, 1, "hel", "lo", end=ending(Reason.PRODUCER_FAILED, "out of words"))
        page = await journal.read("s", ORIGIN, 100, ROOMY)
        mine = [str(frame.id) for frame in page.frames if frame.run == "r"]
        document = orjson.loads(orjson.dumps((await transcript(journal)).document()))
        assert document.pop("started") <= document.pop("ended")
        assert document == {
            "stream": "s",
            "run": "r",
            "status": "failed",
            "reason": "producer_failed",
            "error": "out of words",
            "text": "hello",
            "parts": [{"kind": "text", "index": 0, "text": "hello"}],
            "frames": 2,
            "first": mine[0],
            "last": mine[-1],
            "truncated": False,
            "dialect": "raw",
            "metadata": {"user": 7},
            "superseded_by": None,
        }

    perform(play)


def test_only_the_runs_own_data_is_text_over_many_pages(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await begin(journal, run="other")
        half = PAGE_MAX_FRAMES // 2
        for turn in range(3):
            await say(journal, turn * half + 1, *(f"{turn}," for _ in range(half)))
            await say(journal, turn * half + 1, *("other" for _ in range(half)), run="other")
        await say(journal, 3 * half + 1, end=COMPLETED)
        await say(journal, 3 * half + 1, "after", run="other")
        said = await transcript(journal)
        assert said.text == "0," * half + "1," * half + "2," * half
        assert len(said.text.encode()) == said.info.text_bytes
        assert not said.truncated

    perform(play)


def test_an_open_run_has_the_text_it_has_so_far(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        assert (await transcript(journal)).text == ""
        await say(journal, 1, "so far")
        said = await transcript(journal)
        assert (said.info.status, said.text, said.truncated) == ("open", "so far", False)
        assert said.document()["ended"] is None

    perform(play)


def test_what_relay_itself_says_of_a_broken_answer_is_no_text(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal, answer="{}")
        broken = ending(Reason.UPSTREAM_TRUNCATED)
        await chat(
            journal, chunk({"content": "hel"}), end=broken, error_event=OPENAI_CHAT.error_event(broken)
        )
        said = await transcript(journal)
        assert parts(said) == [("text", 0, "hel")]
        assert (said.info.frames, said.info.text_bytes) == (1, 3)

    perform(play)


@pytest.mark.parametrize(
    ("max_bytes", "text", "truncated"),
    [(7, "a€€", False), (6, "a€", True), (4, "a€", True), (3, "a", True), (0, "", True)],
)
def test_a_text_too_large_is_cut_between_characters(
    perform: Perform, max_bytes: int, text: str, truncated: bool
) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await say(journal, 1, "a€", "€", end=COMPLETED)
        said = await transcript(journal, max_bytes=max_bytes)
        assert (said.text, said.truncated) == (text, truncated)

    perform(play)


def test_what_follows_a_cut_is_left_out_too(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await say(journal, 1, "ab€", "c")
        assert (await transcript(journal, max_bytes=3)).text == "ab"

    perform(play)


def test_a_text_too_large_is_not_read_on(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await say(journal, 1, *("x" for _ in range(3 * PAGE_MAX_FRAMES)))
        assembly = Assembly("s", await journal.run("s", "r"), 5)
        assembly.take(await journal.read("s", assembly.position, PAGE_MAX_FRAMES, ROOMY))
        assert assembly.complete
        assert assembly.transcript().text == "xxxxx"

    perform(play)


def test_what_is_said_while_it_is_read_does_not_make_it_disagree_with_itself(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        await say(journal, 1, "hel")
        assembly = Assembly("s", await journal.run("s", "r"), ROOMY)
        await say(journal, 2, "lo")
        assembly.take(await journal.read("s", assembly.position, PAGE_MAX_FRAMES, ROOMY))
        said = assembly.transcript()
        assert (said.text, said.info.frames, said.info.text_bytes) == ("hel", 1, 3)

    perform(play)


@pytest.mark.parametrize(("trimmed", "text"), [(2, "abc"), (4, "bc"), (6, ""), (9, "")])
def test_a_run_whose_frames_were_trimmed_says_so(perform: Perform, trimmed: int, text: str) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal, run="before")  # frame 1
        await begin(journal)  # frame 2
        await say(journal, 1, "a", "b", "c")  # 3, 4, 5
        await say(journal, 4, end=COMPLETED)  # 6
        await say(journal, 1, "x", "y", run="before")  # 7, 8
        await journal.trim("s", trimmed)
        said = await transcript(journal)
        assert (said.text, said.truncated) == (text, trimmed > 2)

    perform(play)


def test_unknown_runs_and_streams_have_none(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        with pytest.raises(UnknownStream):
            await transcript(journal)
        await begin(journal)
        with pytest.raises(UnknownRun):
            await transcript(journal, "another")

    perform(play)


def test_a_stream_made_anew_meanwhile_lends_no_text_to_the_former_run(perform: Perform) -> None:
    async def play(journal: Journal) -> None:
        await begin(journal)
        assembly = Assembly("s", await journal.run("s", "r"), ROOMY)
        await journal.delete("s")
        await begin(journal)
        await say(journal, 1, "of another life")
        with pytest.raises(UnknownRun):
            assembly.take(await journal.read("s", assembly.position, 10, ROOMY))

    perform(play)
