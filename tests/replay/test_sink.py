"""relay.replay.sink: plain or compressed, each reader gets exactly what was written to it, and at once."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib
from functools import partial
from pathlib import Path

import pytest
from replay.doubtful_journal import Stage, staged

from relay.cursor import ORIGIN
from relay.replay.pages import SharedPage
from relay.replay.reader import Reader
from relay.replay.sink import Deflater, GzipSink, accepts_gzip
from relay.replay.tail import GzipCohort
from relay.replay.view import EventsView


class Wire:
    """What went out, and a sink for it."""

    def __init__(self) -> None:
        self.sent = b""
        self.taking = asyncio.Event()
        self.taking.set()

    @property
    def writable(self) -> bool:
        return self.taking.is_set()

    async def until_writable(self) -> None:
        await self.taking.wait()

    def write(self, data: bytes) -> bool:
        self.sent += data
        return self.writable

    @property
    def text(self) -> str:
        """As much as a client can read of it now."""
        return zlib.decompressobj(31).decompress(self.sent).decode()


Served = tuple[Reader, Wire, asyncio.Task[object]]


def test_what_was_written_can_be_read_at_once_and_is_a_whole_member_in_the_end() -> None:
    wire = Wire()
    sink = GzipSink(wire)
    shared = Deflater()
    assert sink.write(b"hello ")
    assert wire.text == "hello "
    for word in (b"hello ", b"and ", b"hello "):
        assert sink.write_deflated(shared.deflate(word), word)
    assert wire.text == "hello hello and hello "
    assert sink.write(b"bye")
    assert wire.text.endswith("bye")
    sink.finish()
    assert gzip.decompress(wire.sent) == b"hello hello and hello bye"


def test_nothing_at_all_is_a_whole_member_too() -> None:
    wire = Wire()
    GzipSink(wire).finish()
    assert gzip.decompress(wire.sent) == b""


def test_repetition_across_pieces_costs_next_to_nothing() -> None:
    deflater = Deflater()
    first, *others = [
        len(deflater.deflate(b'data: {"delta":{"content":" word"},"n":%d}\n\n' % n)) for n in range(50)
    ]
    assert max(others) < first / 2


def test_who_is_behind_is_told_through_the_compression() -> None:
    wire = Wire()
    sink = GzipSink(wire)
    assert sink.writable
    wire.taking.clear()
    assert not sink.writable
    assert not sink.write(b"a")
    assert not sink.write_deflated(Deflater().deflate(b"b"), b"b")


@pytest.mark.parametrize("seed", range(5))
def test_p2_compressed_readers_that_come_go_and_stall_read_each_frame_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    async def test() -> None:
        async with staged(tmp_path, group_ms=chance.choice([0, 1])) as stage:
            await stage.open()
            readers: list[Served] = []
            said = 0
            together = 0
            for _ in range(120):
                match chance.choice(["come", "say", "say", "say", "stall", "go", "beat", "rest"]):
                    case "come" if len(readers) < 6:
                        readers.append(await arrive(stage))
                    case "say":
                        words = [
                            f"word {said + n} of those that were said" for n in range(chance.randint(1, 3))
                        ]
                        await stage.say(*words)
                        said += len(words)
                    case "stall" if readers:
                        wire = chance.choice(readers)[1]
                        (wire.taking.clear if wire.writable else wire.taking.set)()
                    case "go" if readers:
                        await leave(readers.pop(chance.randrange(len(readers))))
                    case "beat" if readers:
                        reader = chance.choice(readers)[0]
                        reader.heartbeat_due = True
                        reader.wake()
                    case "rest":
                        for _, wire, _ in readers:
                            wire.taking.set()
                        await stage.until(partial(all_have, readers, said + 1))
                        together = max(together, len({id(reader.cohort) for reader, _, _ in readers}))
                        for reader, wire, _ in readers:
                            assert isinstance(reader.cohort, GzipCohort)
                            assert words_in(wire) == said
            assert together == 1  # all of them stood in one cohort then
            for one in readers:
                one[1].taking.set()
                await leave(one)

    asyncio.run(test())


def all_have(readers: list[Served], seq: int) -> bool:
    return all(reader.cohort is not None and reader.position.seq == seq for reader, _, _ in readers)


async def arrive(stage: Stage) -> Served:
    wire = Wire()
    page = SharedPage._make(await stage.journal.real.read("s", ORIGIN, 1000, 10**6))
    reader = Reader(stage.tails, "s", EventsView(None, "events", False, False), ORIGIN, page)
    return reader, wire, asyncio.create_task(reader.run(GzipSink(wire)))


async def leave(one: Served) -> None:
    one[2].cancel()
    await asyncio.gather(one[2], return_exceptions=True)


def words_in(wire: Wire) -> int:
    """How many words a client has read, which must be all from the first on, once and in order."""
    words = [line for line in wire.text.splitlines() if line.startswith("data: word ")]
    assert words == [f"data: word {n} of those that were said" for n in range(len(words))]
    return len(words)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1.0, GZIP;q=0.001", True),
        ("x-gzip", True),
        ("*", True),
        ("deflate, *;q=0.5", True),
        ("gzip ; q=1", True),
        ("", False),
        ("identity", False),
        ("deflate, br", False),
        ("gzip;q=0", False),
        ("gzip;q=0.000, *", False),
        ("*;q=0", False),
        ("gzip;q=0.", False),
    ],
)
def test_what_a_client_accepts(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted
