"""The reaper: finds runs whose process died or whose producer fell silent, and ends them.

There is one in every process, and exactly one of them ends a run: the journal compares and sets. What is
hard is not to end the runs of the living, above all after the journal was away, when nobody could renew a
lease. So a process is taken for dead only after two looks, at least one renewal apart, that found no lease of
it, and only within a *session*: as long as this process's own renewals succeed, its own lease never lapses
and the journal's clock goes on evenly. Anything else proves nothing about others, and what was suspected is
forgotten.

Times are the journal's clock, and the loop's monotonic one for how long something took here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from relay.dialects.detect import error_events
from relay.errors import JournalError, UnknownRun, UnknownStream
from relay.journal.base import Ended, Journal
from relay.lifecycle import OWNER_LOST, Reason, Status, ending
from relay.settings import Settings

log = logging.getLogger("relay.reaper")

TICKS_A_LEASE = 3

BATCH = 32
"""Runs ended at once."""

REINDEXED_A_TICK = 20
"""Streams whose indexes are mended in one tick. 10,000 streams take a quarter of an hour."""

_SAID_OF_LOST = error_events(OWNER_LOST)
_SAID_OF_DUE = {reason: error_events(ending(reason)) for reason in (Reason.IDLE_TIMEOUT, Reason.MAX_RUN)}


class Reaper:
    """Renews this process's lease and ends what others left behind.

    `on_ended` is told stream, run and ending of each run that was ended here. `now` is a monotonic clock in
    seconds.
    """

    def __init__(
        self,
        journal: Journal,
        settings: Settings,
        owner_name: str,
        on_ended: Callable[[str, str, Ended], None],
        now: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._owner = owner_name
        self._lease_s = settings.owner_lease_s
        # An owner may wait so long for an answer before it sees that its connection is dead, and renews anew.
        self._patience_s = settings.journal_timeout_s
        self._on_ended = on_ended
        self._now = now
        self._reachable_since_ms: int | None = None
        """The journal's clock when this session began; None outside of one."""
        self._session_began = 0.0
        self._renewed_ms = 0
        self._suspects: dict[str, float] = {}
        """Owners without a lease at the last look, and when they were first seen so."""
        self._reindexed = ""

    @property
    def tick_s(self) -> float:
        """How often `tick` is to be called: time for an owner to renew in between."""
        return self._lease_s / TICKS_A_LEASE

    async def tick(self) -> None:
        """Renew, look, and end what has to be, for no longer than until the next tick; what is left then
        waits for that. Does not raise."""
        try:
            dead = await self._look()
            until = self._now() + self.tick_s
            for owner, since in dead.items():
                await self._reap_owner(owner, since, until)
            if self._reachable_since_ms is not None:
                await self._reap_due(self._reachable_since_ms, until)
            self._reindexed = await self._journal.reindex(self._reindexed, REINDEXED_A_TICK)
        except JournalError as error:
            if self._reachable_since_ms is not None:
                log.warning("the journal is away, so nobody's silence is judged: %s", error)
            self._end_session()
        except Exception:
            log.exception("a tick failed")

    async def resign(self) -> None:
        """At shutdown: give up the lease, so that what is left open here need not wait for it to lapse."""
        try:
            await self._journal.resign(self._owner)
        except JournalError as error:
            log.warning("the lease is left to lapse: %s", error)

    async def _look(self) -> dict[str, float]:
        """Renew, and find owners that are dead, with the time since when they were suspected."""
        suspects, self._suspects = self._suspects, {}
        began = self._now()
        renewal = await self._journal.renew(self._owner, self._lease_s)
        since_last_ms = renewal.now_ms - self._renewed_ms
        self._renewed_ms = renewal.now_ms
        if not (
            renewal.unbroken
            and self._reachable_since_ms is not None
            and 0 <= since_last_ms <= self._lease_s * 1000
        ):
            suspects = {}
            self._reachable_since_ms, self._session_began = renewal.now_ms, began
        lapsed = await self._journal.lapsed_owners()
        seen = self._now()
        if seen - began > self._lease_s:
            # This process stood still, or the journal did, and its own lease may have lapsed since.
            self._end_session()
            return {}
        if began - self._session_began >= self._patience_s:
            self._suspects = {owner: suspects.get(owner, seen) for owner in lapsed}
        # Ticks that follow each other quickly, as after a late one, are one look: nobody renewed in between.
        return {
            owner: since
            for owner, since in self._suspects.items()
            if owner in suspects and seen - since >= self.tick_s / 2
        }

    def _end_session(self) -> None:
        self._reachable_since_ms = None
        self._suspects = {}

    async def _reap_owner(self, owner: str, since: float, until: float) -> None:
        async def reap(stream: str, run: str) -> None:
            ended = await self._journal.end_run(stream, run, OWNER_LOST, _SAID_OF_LOST, owner=owner)
            if ended.by_this:
                silent_s = self._lease_s + self._now() - since
                log.warning(
                    "owner is gone stream=%s run=%s owner=%s silent_s=%.1f", stream, run, owner, silent_s
                )
                self._on_ended(stream, run, ended)
            elif ended.status is not Status.OPEN:
                await self._journal.file_ending(stream, run)

        await self._reap(lambda limit: self._journal.owned(owner, limit), reap, until)

    async def _reap_due(self, reachable_since_ms: int, until: float) -> None:
        async def reap(stream: str, run: str) -> None:
            ended = await self._journal.end_due(stream, run, reachable_since_ms, _SAID_OF_DUE)
            if ended is not None and ended.by_this:
                self._on_ended(stream, run, ended)
            elif ended is not None:
                await self._journal.file_ending(stream, run)

        await self._reap(self._journal.due_runs, reap, until)

    async def _reap(
        self,
        find: Callable[[int], Awaitable[Sequence[tuple[str, str]]]],
        reap: Callable[[str, str], Awaitable[None]],
        until: float,
    ) -> None:
        """Reap what `find` finds, batch by batch, each run once."""
        tried: set[tuple[str, str]] = set()
        limit = BATCH
        while True:
            found = await find(limit)
            batch = [run for run in found if run not in tried]
            # Also when this process stood still for a while: then it has to renew first.
            if self._now() > until or (not batch and len(found) < limit):
                return
            limit = BATCH + len(found) - len(batch)
            tried.update(batch)
            outcomes = await asyncio.gather(
                *(self._reap_one(reap, *run) for run in batch), return_exceptions=True
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _reap_one(self, reap: Callable[[str, str], Awaitable[None]], stream: str, run: str) -> None:
        try:
            await reap(stream, run)
        except (UnknownStream, UnknownRun):
            await self._journal.file_ending(stream, run)
        except JournalError:
            raise
        except Exception:
            log.exception("run cannot be ended stream=%s run=%s", stream, run)
