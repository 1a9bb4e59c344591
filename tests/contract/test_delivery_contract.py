"""What relay.journal.base promises of the delivery of endings, of every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from contract.phrases import CANCELLED, COMPLETED, LOST, batch, everything, opening, until

from relay.journal.base import Delivery, Journal
from relay.journal.sqlite import SqliteJournal
from relay.limits import Retention

ALL = 1000
LONG_S = 3600
SOON_S = 0.03


async def due(journal: Journal, stream: str, lease_s: float = LONG_S) -> list[Delivery]:
    """Claims what is due, and answers what is of this stream."""
    return [found for found in await journal.claim_deliveries(ALL, lease_s) if found.stream == stream]


async def an_ended_run(journal: Journal, stream: str, run: str = "r1", **changes: Any) -> None:
    await journal.open_run(opening(stream, run, deliver=True, **changes))
    await journal.append(batch(stream, 1, "a", run=run, ending=COMPLETED))


async def due_in_time(journal: Journal, stream: str, clock: str) -> list[Delivery]:
    """What of a stream is due before something that became due just now is due again."""
    claimed: list[Delivery] = []

    async def is_due(lease_s: float) -> bool:
        found = await journal.claim_deliveries(ALL, lease_s)
        claimed.extend(found)
        return any(delivery.stream == clock for delivery in found)

    await an_ended_run(journal, clock)
    await until(lambda: is_due(SOON_S))
    await until(lambda: is_due(LONG_S))
    await journal.settle_delivery(clock, "r1")
    return [delivery for delivery in claimed if delivery.stream == stream]


# Claiming.


async def test_the_end_of_a_run_is_delivered_if_its_opening_asked_for_it(
    journal: Journal, stream: str
) -> None:
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "a", run="r2", ending=COMPLETED))
    await an_ended_run(journal, stream)
    assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", 0)]
    assert await due(journal, stream) == []
    await journal.settle_delivery(stream, "r1")


async def test_an_open_run_is_not_delivered(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "open", deliver=True))
    await journal.file_ending(stream, "open")
    await an_ended_run(journal, stream)
    assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", 0)]
    await journal.settle_delivery(stream, "r1")


async def test_whoever_ended_it_the_end_is_delivered(journal: Journal, owner: Any, stream: str) -> None:
    """Its writer, anybody, a reaper, or a run that took its place."""
    await an_ended_run(journal, stream, "r1")
    await journal.open_run(opening(stream, "r2", deliver=True))
    await journal.end_run(stream, "r2", CANCELLED, {})
    await journal.open_run(opening(stream, "r3", deliver=True, owner=owner.name))
    await journal.end_run(stream, "r3", LOST, {}, owner=owner.name)
    await journal.open_run(opening(stream, "r4", deliver=True, idle_timeout_s=SOON_S))
    await until(lambda: journal.end_due(stream, "r4", 0, {}))
    await journal.open_run(opening(stream, "r5", deliver=True))
    await journal.open_run(opening(stream, "r6", supersedes=["r5"]))
    await journal.open_run(opening(stream, "r7", deliver=True, if_busy="supersede"))
    found: list[Delivery] = []

    async def all_found() -> bool:
        found.extend(await due(journal, stream))
        return len(found) >= 5

    await until(all_found)
    assert sorted(found) == [Delivery(stream, f"r{n}", 0) for n in range(1, 6)]
    for n in range(1, 6):
        await journal.settle_delivery(stream, f"r{n}")


async def test_every_end_is_given_to_one_claimer(journal: Journal, stream: str) -> None:
    for n in range(6):
        await an_ended_run(journal, stream, f"r{n}")
    found: list[Delivery] = []

    async def claim() -> bool:
        claims = await asyncio.gather(*(journal.claim_deliveries(2, LONG_S) for _ in range(8)))
        assert max(map(len, claims)) <= 2
        found.extend(delivery for claim in claims for delivery in claim if delivery.stream == stream)
        return len(found) >= 6

    await until(claim)
    assert sorted(found) == [Delivery(stream, f"r{n}", 0) for n in range(6)]
    for n in range(6):
        await journal.settle_delivery(stream, f"r{n}")


async def test_an_end_that_nobody_settled_is_given_again_after_the_lease(
    journal: Journal, stream: str
) -> None:
    """Its claimer may have died. Only tries that failed are counted: of this one nobody knows."""
    await an_ended_run(journal, stream)
    for _ in range(3):
        assert await until(lambda: due(journal, stream, SOON_S)) == [Delivery(stream, "r1", 0)]
    for tries in range(3):
        assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", tries)]
        await journal.postpone_delivery(stream, "r1", SOON_S)
    assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", 3)]
    await journal.settle_delivery(stream, "r1")


async def test_what_is_settled_is_never_given_again(journal: Journal, name: Callable[[str], str]) -> None:
    """Not after its lease, nor when its ending is filed once more."""
    stream = name("stream")
    await an_ended_run(journal, stream)
    assert await until(lambda: due(journal, stream, SOON_S))
    await journal.settle_delivery(stream, "r1")
    await journal.settle_delivery(stream, "r1")
    await journal.file_ending(stream, "r1")
    await journal.postpone_delivery(stream, "r1", 0)
    assert await due_in_time(journal, stream, name("clock")) == []
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    await journal.end_run(stream, "r1", CANCELLED, {})
    assert await due_in_time(journal, stream, name("clock-2")) == []


async def test_what_is_postponed_is_given_when_it_said(
    steered: SqliteJournal, clock: Any, stream: str
) -> None:
    await an_ended_run(steered, stream)
    assert await due(steered, stream, 10) == [Delivery(stream, "r1", 0)]
    await steered.postpone_delivery(stream, "r1", 100)
    clock.ms += 99_999
    assert await due(steered, stream, 10) == []
    clock.ms += 2
    assert await due(steered, stream, 10) == [Delivery(stream, "r1", 1)]
    clock.ms += 9_999
    assert await due(steered, stream, 10) == []
    clock.ms += 2
    assert await due(steered, stream, 10) == [Delivery(stream, "r1", 1)]


async def test_what_is_unknown_is_settled_and_postponed_without_error(journal: Journal, stream: str) -> None:
    await journal.settle_delivery(stream, "r1")
    await journal.postpone_delivery(stream, "r1", 1)
    await journal.open_run(opening(stream))
    await journal.settle_delivery(stream, "r2")
    await journal.postpone_delivery(stream, "r2", 1)
    assert await due(journal, stream) == []


async def test_nothing_of_a_deleted_stream_is_delivered(journal: Journal, name: Callable[[str], str]) -> None:
    """Neither what waited for it, nor what the deletion ended; a later run of the same name is."""
    stream = name("stream")
    await an_ended_run(journal, stream, "r1")
    await an_ended_run(journal, stream, "r2")
    assert await until(lambda: due(journal, stream, SOON_S))
    await journal.open_run(opening(stream, "r3", deliver=True))
    await journal.delete(stream)
    assert await due_in_time(journal, stream, name("clock")) == []
    await an_ended_run(journal, stream, "r1")
    found = await until(lambda: due(journal, stream))
    assert [(delivery.stream, delivery.run) for delivery in found] == [(stream, "r1")]
    await journal.settle_delivery(stream, "r1")


# Retention.


async def held(journal: Journal, stream: str) -> list[int]:
    return [frame.seq for frame in await everything(journal, stream)]


async def test_frames_wait_for_their_delivery_up_to_twice_the_bound(journal: Journal, stream: str) -> None:
    """And no longer than for that; frames of before are not spared."""
    await journal.open_run(opening(stream, "before", retention=Retention(10, 0, 0)))
    await journal.append(batch(stream, 1, "a", run="before", ending=COMPLETED))
    await an_ended_run(journal, stream)  # 4, 5, 6
    await journal.open_run(opening(stream, "after"))  # 7
    for seq in range(8, 24):
        await journal.append(batch(stream, seq - 7, "x", run="after"))
        assert await held(journal, stream) == list(range(min(4, max(1, seq - 9)), seq + 1))
    for seq in range(24, 30):
        await journal.append(batch(stream, seq - 7, "x", run="after"))
        assert len(await held(journal, stream)) <= 20
        assert (await held(journal, stream))[-10:] == list(range(seq - 9, seq + 1))
    await journal.settle_delivery(stream, "r1")


async def test_delivered_frames_are_trimmed_as_any_others(journal: Journal, stream: str) -> None:
    await an_ended_run(journal, stream, retention=Retention(10, 0, 0))
    await journal.open_run(opening(stream, "after"))
    await journal.append(batch(stream, 1, *"abcdefghij", run="after"))
    assert await held(journal, stream) == list(range(1, 15))
    assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", 0)]
    await journal.append(batch(stream, 11, "k", run="after"))
    assert await held(journal, stream) == list(range(1, 16))
    await journal.settle_delivery(stream, "r1")
    await journal.append(batch(stream, 12, "l", run="after"))
    assert await held(journal, stream) == list(range(7, 17))


async def test_several_deliveries_are_waited_for_each(journal: Journal, stream: str) -> None:
    await an_ended_run(journal, stream, "r1", retention=Retention(10, 0, 0))  # 1, 2, 3
    await an_ended_run(journal, stream, "r2")  # 4, 5, 6
    await journal.open_run(opening(stream, "after"))  # 7
    await journal.append(batch(stream, 1, *"abcdefgh", run="after"))  # to 15
    assert (await held(journal, stream))[0] == 1
    await journal.settle_delivery(stream, "r1")
    await journal.append(batch(stream, 9, "x", run="after"))
    assert await held(journal, stream) == list(range(4, 17))
    await journal.settle_delivery(stream, "r2")
    await journal.append(batch(stream, 10, "x", run="after"))
    assert await held(journal, stream) == list(range(8, 18))


async def test_bytes_wait_for_their_delivery_up_to_twice_the_bound(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, deliver=True, retention=Retention(0, 1000, 0)))
    await journal.append(batch(stream, 1, b"x" * 100, ending=COMPLETED))
    await journal.open_run(opening(stream, "after"))
    for seq in range(1, 14):
        await journal.append(batch(stream, seq, b"y" * 100, run="after"))
        info = await journal.describe(stream)
        assert (info.extent.earliest_seq, info.extent.top.seq) == (1, 4 + seq)
    assert 1000 < info.bytes_held <= 2000
    for seq in range(14, 30):
        await journal.append(batch(stream, seq, b"y" * 100, run="after"))
        info = await journal.describe(stream)
        assert 900 <= info.bytes_held <= 2000
    assert info.extent.earliest_seq > 1
    await journal.settle_delivery(stream, "r1")
    await journal.append(batch(stream, 30, b"y" * 100, run="after"))
    assert 900 < (await journal.describe(stream)).bytes_held <= 1000


async def test_an_operator_trims_what_is_not_delivered(journal: Journal, stream: str) -> None:
    """Only retention waits."""
    await an_ended_run(journal, stream)
    await journal.trim(stream, 3)
    assert await held(journal, stream) == [3]
    assert await until(lambda: due(journal, stream)) == [Delivery(stream, "r1", 0)]
    await journal.settle_delivery(stream, "r1")
