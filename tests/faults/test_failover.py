"""A primary is killed with frames that no replica has: where the writer lives, nothing has happened; where it
does not, readers are told, and the run ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest
from faults import failovers
from faults.failovers import Cluster
from faults.tally import Tally
from scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def cluster(upstream: ScriptedUpstream) -> Iterator[Cluster]:
    with Cluster.running(upstream) as cluster:
        yield cluster


def test_p2_frames_that_no_replica_had_are_put_back_and_no_reader_notices(
    cluster: Cluster, seed: int, tally: Tally
) -> None:
    """Whether upstream talks or is silent, the run was ended or opened just before, or two took turns."""
    asyncio.run(failovers.fail_over(cluster, Random(seed), tally, failovers.WRITER_LIVES))


def test_p8_what_nobody_can_put_back_is_told_once_and_its_run_ends_once(
    cluster: Cluster, seed: int, tally: Tally
) -> None:
    """The writer died with the primary, or holds less than was lost."""
    asyncio.run(failovers.fail_over(cluster, Random(seed), tally, failovers.WRITER_LOST, kill_owner=True))


def test_requests_in_a_failover_are_done_or_refused_and_producers_asked_for_what_was_lost(
    cluster: Cluster, seed: int, tally: Tally
) -> None:
    """Pushes, cancels, regenerates, heartbeats: nothing is done by half."""
    asyncio.run(failovers.fail_over(cluster, Random(seed), tally, failovers.MEANWHILE))
