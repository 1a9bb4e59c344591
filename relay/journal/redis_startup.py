"""Which servers can hold a journal."""

from __future__ import annotations

from collections.abc import Mapping

from redis.exceptions import RedisError

from relay.errors import StartupError
from relay.journal.redis_connection import Address, fetch_info

OLDEST_SERVER = (6, 2)

_NOT_LET_IN = ("NOAUTH", "WRONGPASS", "NOPERM", "uthentication", "no permissions", "invalid username")


async def check_server(address: Address, timeout_s: float) -> None:
    """Raises `StartupError` for a server that cannot be reached, or cannot hold a journal."""
    check_info(await _ask_server(address, timeout_s), address.name)


async def _ask_server(address: Address, timeout_s: float) -> dict[str, str]:
    try:
        return await fetch_info(address, timeout_s)
    except (RedisError, OSError, TimeoutError) as error:
        text = (str(error) or "no answer in time").rstrip(".")
        if isinstance(error, RedisError) and any(sign in text for sign in _NOT_LET_IN):
            raise StartupError(
                f"Redis at {address.name} does not let us in: {text}. Put the user and password into the URL "
                "(redis://user:password@host:6379/0), and let the user run INFO, EVAL and the data commands."
            ) from None
        raise StartupError(
            f"Redis at {address.name} cannot be reached: {text}. Check host, port and TLS (rediss://), "
            "or use --journal sqlite:///path/to/relay.db."
        ) from None


def check_info(info: Mapping[str, str], name: str) -> None:
    """Raises `StartupError` for a server that cannot hold a journal, by what INFO tells of it."""
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        raise StartupError(f"Redis at {name} is {version}; relay needs 6.2 or newer, or Valkey.")
    if info.get("cluster_enabled") == "1":
        raise StartupError(
            f"Redis at {name} runs in cluster mode, which relay does not speak yet. "
            "Give it a single primary, with replicas or Sentinel."
        )
    if info.get("role") == "slave":
        raise StartupError(
            f"Redis at {name} is a replica and takes no writes. Give the address of its primary."
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StartupError(
            f"Redis at {name} may evict keys (maxmemory-policy {policy}): accepted frames could "
            "vanish. Set maxmemory-policy to noeviction, or give relay a Redis of its own."
        )
