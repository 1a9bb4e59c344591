"""A plain list must agree with the journal and with every reader, whatever happens (DESIGN section 2).

`make soak` runs the same machine for as long as you like.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from model.backends import Backend, RedisBackend, SqliteBackend
from model.machine import Machine
from redis_server import RedisServer

SLICE = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def _run(make: Callable[[], Backend]) -> None:
    machine = type("Machine", (Machine,), {"make_backend": staticmethod(make)})
    run_state_machine_as_test(machine, settings=SLICE)


def test_every_reader_agrees_with_a_plain_list_over_sqlite() -> None:
    """P2 and P8, with lost hints, failing reads, drops, trims, rewinds and restarts."""
    _run(SqliteBackend)


def test_every_reader_agrees_with_a_plain_list_over_redis(redis_server: RedisServer) -> None:
    """The same, and rewound under a relay that runs."""
    _run(lambda: RedisBackend(redis_server.url(db=7)))
