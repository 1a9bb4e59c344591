"""A Redis that cannot hold a journal is refused at the start, with what to do about it."""

from __future__ import annotations

import asyncio

import pytest
from redis_journal import DEADLINE_S, Ear, opening
from redis_server import RedisServer

from relay.errors import StartupError
from relay.journal.redis_startup import check_info
from relay.journal.redis_streams import RedisJournal


def start_error(url: str, timeout_s: float = DEADLINE_S) -> str:
    async def scenario() -> str:
        journal = RedisJournal(url, timeout_s=timeout_s)
        with pytest.raises(StartupError) as caught:
            await journal.start(Ear())
        await journal.close()
        return str(caught.value)

    return asyncio.run(scenario())


def test_a_url_that_is_none_is_refused() -> None:
    assert "redis://user:password@host" in start_error("http://127.0.0.1:1/")
    assert "no_such" in start_error("redis://127.0.0.1/0?no_such=1")


def test_a_server_that_is_not_there_is_refused() -> None:
    assert "cannot be reached" in start_error("redis://127.0.0.1:1/0")


def test_a_server_that_does_not_answer_is_refused(own_redis: RedisServer) -> None:
    own_redis.pause()
    assert "cannot be reached" in start_error(own_redis.url(), timeout_s=0.3)


def test_a_server_that_wants_another_password_is_refused(own_redis: RedisServer) -> None:
    with own_redis.client() as client:
        client.config_set("requirepass", "right")
    assert "password" in start_error(own_redis.url())
    assert "password" in start_error(f"redis://:wrong@127.0.0.1:{own_redis.port}/0")

    async def scenario() -> None:
        journal = RedisJournal(f"redis://:right@127.0.0.1:{own_redis.port}/0", timeout_s=DEADLINE_S)
        await journal.start(Ear())
        await journal.open_run(opening("s"))
        await journal.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused(own_redis: RedisServer, policy: str) -> None:
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", policy)
    message = start_error(own_redis.url())
    assert policy in message
    assert "noeviction" in message


def test_a_replica_is_refused(own_redis: RedisServer) -> None:
    with own_redis.client() as client:
        client.replicaof("127.0.0.1", 1)
    assert "replica" in start_error(own_redis.url())


def test_cluster_mode_is_refused() -> None:
    server = RedisServer.start("--cluster-enabled", "yes")
    try:
        assert "cluster mode" in start_error(server.url())
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("version", "accepted"), [("6.0.16", False), ("5.0.7", False), ("6.2.0", True), ("7.2.4", True)]
)
def test_an_old_server_is_refused(version: str, accepted: bool) -> None:
    """Valkey reports redis_version 7.2.4."""
    info = {"redis_version": version, "role": "master", "maxmemory_policy": "noeviction"}
    if accepted:
        check_info(info, "here")
    else:
        with pytest.raises(StartupError, match=r"6\.2"):
            check_info(info, "here")
