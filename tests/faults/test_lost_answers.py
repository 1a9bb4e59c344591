"""Answers to a producer are lost and the relay it talks to dies: the journal has each of its frames once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest
from faults.lost_answers import producer_retries
from faults.pair import FAST, Pair
from faults.tally import Tally
from redis_server import RedisServer
from scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[Pair]:
    with Pair.running(redis_server, upstream, **FAST) as pair:
        yield pair


def test_p5_a_producer_goes_on_at_another_relay_with_its_token_and_numbers(
    pair: Pair, seed: int, tally: Tally
) -> None:
    rng = Random(seed)
    for _ in range(3):
        asyncio.run(producer_retries(pair, rng, tally))
