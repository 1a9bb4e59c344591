"""What relay.journal.base promises of idempotency keys."""

from __future__ import annotations

import asyncio
from typing import Any

from contract.phrases import DEADLINE_S

from relay.journal.base import Claim, Journal
from relay.journal.sqlite import SqliteJournal


async def test_the_first_claim_wins_and_others_see_it_pending(journal: Journal, stream: str) -> None:
    assert await journal.claim(stream, "digest", "owner", 60, 3600) == Claim("won")
    assert await journal.claim(stream, "digest", "another", 60, 3600) == Claim("pending")


async def test_one_of_many_concurrent_claims_wins(journal: Journal, stream: str) -> None:
    claims = await asyncio.gather(*(journal.claim(stream, "digest", f"o{n}", 60, 3600) for n in range(20)))
    assert sorted(claim.state for claim in claims) == ["pending"] * 19 + ["won"]


async def test_the_owner_renews_its_own_claim(journal: Journal, stream: str) -> None:
    for _ in range(3):
        assert (await journal.claim(stream, "digest", "owner", 60, 3600)).state == "won"


async def test_another_body_is_a_mismatch_pending_or_settled(journal: Journal, stream: str) -> None:
    await journal.claim(stream, "digest", "owner", 60, 3600)
    assert (await journal.claim(stream, "other", "another", 60, 3600)).state == "mismatch"
    assert (await journal.claim(stream, "other", "owner", 60, 3600)).state == "mismatch"
    await journal.settle(stream, "owner", "s", "r")
    assert (await journal.claim(stream, "other", "another", 60, 3600)).state == "mismatch"
    assert await journal.claim(stream, "digest", "another", 60, 3600) == Claim("settled", "s", "r")


async def test_a_settled_claim_says_which_run_it_led_to(journal: Journal, stream: str) -> None:
    await journal.claim(stream, "digest", "owner", 60, 3600)
    await journal.settle(stream, "owner", "s", "r")
    await journal.settle(stream, "owner", "s", "r")
    for owner in ("owner", "another"):
        assert await journal.claim(stream, "digest", owner, 60, 3600) == Claim("settled", "s", "r")


async def test_settling_and_releasing_anothers_claim_do_nothing(journal: Journal, stream: str) -> None:
    await journal.settle(stream, "nobody", "s", "r")
    await journal.release(stream, "nobody")
    await journal.claim(stream, "digest", "owner", 60, 3600)
    await journal.settle(stream, "another", "s", "r")
    await journal.release(stream, "another")
    assert (await journal.claim(stream, "digest", "another", 60, 3600)).state == "pending"


async def test_a_released_claim_can_be_won_by_another(journal: Journal, stream: str) -> None:
    await journal.claim(stream, "digest", "owner", 60, 3600)
    await journal.release(stream, "owner")
    assert (await journal.claim(stream, "other", "another", 60, 3600)).state == "won"


async def test_a_settled_claim_is_not_released(journal: Journal, stream: str) -> None:
    await journal.claim(stream, "digest", "owner", 60, 3600)
    await journal.settle(stream, "owner", "s", "r")
    await journal.release(stream, "owner")
    assert (await journal.claim(stream, "digest", "another", 60, 3600)).state == "settled"


async def until_won(journal: Journal, key: str, digest: str, owner: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await journal.claim(key, digest, owner, 60, 3600)).state != "won":
            pass


async def test_a_claim_that_is_not_renewed_lapses(journal: Journal, stream: str) -> None:
    """Then it is another's, with any body, and the late owner can neither settle nor release it."""
    await journal.claim(stream, "digest", "owner", 0.02, 3600)
    await until_won(journal, stream, "other", "another")
    await journal.settle(stream, "owner", "s", "r")
    await journal.release(stream, "owner")
    assert (await journal.claim(stream, "other", "third", 60, 3600)).state == "pending"


async def test_a_lapsed_claim_nobody_else_took_can_still_be_settled(
    steered: SqliteJournal, clock: Any
) -> None:
    await steered.claim("k", "digest", "owner", 10, 3600)
    clock.ms += 11_000
    await steered.sweep()
    await steered.settle("k", "owner", "s", "r")
    assert await steered.claim("k", "digest", "another", 10, 3600) == Claim("settled", "s", "r")


async def test_a_settled_claim_is_kept_as_long_as_it_said(journal: Journal, stream: str) -> None:
    await journal.claim(stream, "digest", "owner", 60, 0.02)
    await journal.settle(stream, "owner", "s", "r")
    await until_won(journal, stream, "other", "another")


async def test_leases_are_counted_from_the_last_renewal(steered: SqliteJournal, clock: Any) -> None:
    for _ in range(5):
        assert (await steered.claim("k", "digest", "owner", 10, 3600)).state == "won"
        clock.ms += 9_999
        assert (await steered.claim("k", "digest", "another", 10, 3600)).state == "pending"
    clock.ms += 1
    assert (await steered.claim("k", "digest", "another", 10, 3600)).state == "won"


async def test_a_settled_claim_is_kept_from_when_it_was_settled(steered: SqliteJournal, clock: Any) -> None:
    await steered.claim("k", "digest", "owner", 10, 100)
    clock.ms += 9_000
    await steered.settle("k", "owner", "s", "r")
    clock.ms += 99_999
    assert (await steered.claim("k", "digest", "another", 10, 100)).state == "settled"
    clock.ms += 1
    assert (await steered.claim("k", "digest", "another", 10, 100)).state == "won"
