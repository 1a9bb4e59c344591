"""Runs are stopped from several sides at once, or unheard: each ends once, and upstream is let go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from faults import cancels
from faults.pair import FAST, Pair
from faults.tally import Tally
from redis_server import RedisServer
from scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[Pair]:
    # So long that no owner is taken for dead before it was killed, whatever else the machine does.
    with Pair.running(redis_server, upstream, **(FAST | {"owner_lease_s": 2.4})) as pair:
        yield pair


Scene = Callable[[Pair, Random, Tally], Coroutine[Any, Any, None]]


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(
            partial(cancels.races, race=cancels.with_natural_end, count=100), id="and it ends by itself"
        ),
        pytest.param(
            partial(cancels.races, race=cancels.with_supersede, count=48), id="and it is superseded"
        ),
        pytest.param(cancels.cancelled_twice, id="at both relays"),
        pytest.param(cancels.cancelled_unheard, id="and its owner is not told"),
        pytest.param(cancels.cancelled_when_dead, id="and its owner is dead"),
        pytest.param(cancels.resumed_and_cancelled, id="and it was resumed elsewhere"),
    ],
)
def test_p3_a_run_that_is_cancelled_ends_once_and_lets_upstream_go(
    pair: Pair, seed: int, tally: Tally, scene: Scene
) -> None:
    asyncio.run(scene(pair, Random(seed), tally))
