"""Reading from a SQLite journal: what its lists leave out, and their order."""

from __future__ import annotations

from pathlib import Path

from journal_file import (
    SteeredClock,
    batch,
    on_a_loop,
    opening,
    refusals,
    started,
)

from relay.cursor import ORIGIN
from relay.errors import UnknownStream
from relay.limits import Retention


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
