"""`relay doctor`: looks at a relay from outside, and says what will hurt before it does.

Each finding is one line: `ok`, `warn` or `fail`, what it is about, what was found, and for the last two what
to do about it. What only the relay itself can see (its journal, its upstream, its limits) it tells in
`/relay/v1/diagnostics`; what only a client can see (whether writes arrive one by one) is tried.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from shutil import disk_usage
from time import perf_counter, time
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp

from relay.client import Producer, Unreachable, get
from relay.errors import (
    Forbidden,
    JournalError,
    RelayError,
    RouteNotFound,
    StartupError,
    Unauthorized,
)
from relay.journal.base import Condition, Journal
from relay.progress import size

PATIENCE_S = 5.0
"""Longest wait for an answer, and for a piece that has been written."""

SLOW_ANSWER_S = 0.05
"""A journal that takes longer to answer is felt in every frame."""

CLOCK_APART_S = 0.5
"""Clocks that differ by more make delays that are measured between them worthless."""

DISK_LOW_BYTES, DISK_FULL_BYTES = 2**30, 100 * 2**20
MEMORY_HIGH, MEMORY_FULL = 0.75, 0.95

PIECES = 3
"""Writes that are tried, one after the other."""


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """What was found of a subject, and what to do about it."""

    level: Level
    subject: str
    said: str
    advice: str = ""

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.level:<5} {self.subject:<10} {self.said}"
        if self.advice:
            yield f"{'':16} → {self.advice}"


# What a relay says of itself


async def journal_state(journal: Journal) -> dict[str, Any]:
    """How a journal is, as members of `/relay/v1/diagnostics`: what it says of itself, how long it took, and
    how far its clock is ahead of this host's."""
    began, began_at = perf_counter(), time()
    try:
        condition = await journal.condition()
    except JournalError as error:
        return {"answers": False, "error": str(error)}
    took_s = perf_counter() - began
    return state_of(condition, took_s, began_at + took_s / 2)


def state_of(condition: Condition, took_s: float, asked_at: float) -> dict[str, Any]:
    """The same of what was asked at a time (seconds since 1970)."""
    return {
        "answers": True,
        "kind": condition.kind,
        "version": condition.version,
        "answered_in_s": round(took_s, 6),
        "clock_ahead_s": round(condition.now_ms / 1000 - asked_at, 3),
        **condition.details,
    }


async def upstream_state(url: str) -> dict[str, Any] | None:
    """Whether a connection to upstream can be made; None when there is no upstream. Nothing is sent."""
    if not url:
        return None
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    place = f"{host}:{port}"
    began = perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or "no answer in time").lower()
        return {"place": place, "reachable": False, "error": reason}
    writer.close()
    return {"place": place, "reachable": True, "connected_in_s": round(perf_counter() - began, 6)}


# What to think of it


def judge(diagnostics: Mapping[str, Any]) -> list[Finding]:
    """What a relay's diagnostics say."""
    return [
        *judge_relay(diagnostics),
        *judge_journal(diagnostics["journal"]),
        judge_upstream(diagnostics["upstream"]),
    ]


def judge_relay(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    """Of the process itself, and its limits."""
    relay = diagnostics["relay"]
    if diagnostics["draining"]:
        yield Finding(Level.WARN, "relay", f"{relay['version']}, shutting down")
    else:
        yield Finding(Level.OK, "relay", f"{relay['version']} answers")
    silent = [worker["worker"] for worker in diagnostics.get("workers", ()) if not worker["answers"]]
    if silent:
        numbers = ", ".join(map(str, silent))
        yield Finding(Level.FAIL, "workers", f"no answer of {numbers}", "The log says what became of them.")
    if not relay["authentication"]:
        yield Finding(
            Level.WARN, "access", "nobody is asked for a credential",
            "Whoever reaches relay reads and writes all. Give --admin-key and --jwt-secret, or --auth-url.",
        )  # fmt: skip
    allowed, wanted = relay["connections_allowed"], relay["connections_wanted"]
    if allowed < wanted:
        yield Finding(
            Level.WARN, "files", f"{allowed} connections can be open, and settings allow for {wanted}",
            f"Raise the limit of open files (ulimit -n) to {wanted + 256}, or lower --readers-max.",
        )  # fmt: skip


def judge_journal(journal: Mapping[str, Any]) -> Iterator[Finding]:
    """Of the journal, as `journal_state` gives it."""
    if not journal["answers"]:
        yield Finding(
            Level.FAIL, "journal", f"does not answer: {journal['error']}",
            "Nothing is journaled and no stream is read until it is back.",
        )  # fmt: skip
        return
    took_s = journal["answered_in_s"]
    slow = took_s > SLOW_ANSWER_S
    yield Finding(
        Level.WARN if slow else Level.OK,
        "journal",
        f"{journal.get('server', journal['kind'])} {journal['version']} answers in {took_s * 1000:.1f} ms",
        "Every frame waits for it: put it nearer, or find out what it is busy with." if slow else "",
    )
    yield from (_judge_redis if journal["kind"] == "redis" else _judge_sqlite)(journal)


def _judge_redis(redis: Mapping[str, Any]) -> Iterator[Finding]:
    ahead_s = redis["clock_ahead_s"]
    if abs(ahead_s) - redis["answered_in_s"] > CLOCK_APART_S:
        yield Finding(
            Level.WARN, "clock", f"Redis's is {ahead_s:+.1f} s from this host's",
            "Have both hosts synchronise (NTP): relay_delivery_delay_seconds compares the two.",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "clock", f"Redis's is {ahead_s:+.3f} s from this host's")
    if redis["role"] == "slave":
        yield Finding(
            Level.FAIL, "role", "a replica, which takes no writes", "Give the address of its primary."
        )
    yield from _judge_memory(redis)
    yield from _judge_persistence(redis)


def _judge_memory(redis: Mapping[str, Any]) -> Iterator[Finding]:
    policy, used, most = redis["memory_policy"], redis["memory_bytes"], redis["memory_max_bytes"]
    if policy is None:
        yield Finding(Level.WARN, "eviction", "Redis does not tell its policy", "It must be noeviction.")
    elif policy != "noeviction":
        yield Finding(
            Level.FAIL, "eviction", f"maxmemory-policy is {policy}: accepted frames may vanish",
            "CONFIG SET maxmemory-policy noeviction, or give relay a Redis of its own.",
        )  # fmt: skip
    elif redis["evicted_keys"]:
        yield Finding(
            Level.WARN, "eviction", f"noeviction now, but {redis['evicted_keys']} keys were evicted before",
            "Frames among them are gone; their readers are told by gap or reset.",
        )  # fmt: skip
    else:
        yield Finding(Level.OK, "eviction", "noeviction, and nothing was evicted")
    if not most:
        yield Finding(
            Level.WARN, "memory", f"{size(used)} used, without a bound",
            "Set maxmemory: at a bound Redis refuses, and relay says so; without one the system kills it.",
        )  # fmt: skip
        return
    share = used / most
    level = Level.FAIL if share > MEMORY_FULL else Level.WARN if share > MEMORY_HIGH else Level.OK
    advice = "At the bound no frame is taken. Raise maxmemory, or lower --max-bytes or --retention-s."
    said = f"{size(used)} of {size(most)} used ({share:.0%})"
    yield Finding(level, "memory", said, "" if level is Level.OK else advice)


def _judge_persistence(redis: Mapping[str, Any]) -> Iterator[Finding]:
    if redis["aof"]:
        if redis["aof_last_write_ok"]:
            yield Finding(Level.OK, "restart", "Redis keeps an append-only file")
        else:
            yield Finding(
                Level.FAIL, "restart", "Redis cannot write its append-only file", "See its log and disk."
            )
    elif not redis["rdb_last_save_ok"]:
        yield Finding(Level.FAIL, "restart", "Redis cannot write its snapshots", "See its log and disk.")
    else:
        changes = redis["rdb_changes_since_save"] or 0
        yield Finding(
            Level.WARN, "restart", f"Redis keeps snapshots at most: {changes} changes are in none",
            "A restart loses them, and readers are told so. Set appendonly yes.",
        )  # fmt: skip


def _judge_sqlite(sqlite: Mapping[str, Any]) -> Iterator[Finding]:
    yield judge_disk(sqlite["disk_free_bytes"])
    if sqlite["synchronous"] != "full":
        yield Finding(
            Level.OK, "restart", "frames survive the process, not a power cut (?synchronous=full does)"
        )
    else:
        yield Finding(Level.OK, "restart", "frames survive a power cut")


def judge_disk(free_bytes: int) -> Finding:
    """Of the room for a journal's file."""
    level = Level.OK
    if free_bytes < DISK_LOW_BYTES:
        level = Level.FAIL if free_bytes < DISK_FULL_BYTES else Level.WARN
    advice = (
        ""
        if level is Level.OK
        else "Make room, or lower --retention-s: with a full disk nothing is journaled."
    )
    return Finding(level, "disk", f"{size(free_bytes)} free", advice)


def judge_upstream(upstream: Mapping[str, Any] | None) -> Finding:
    """Of upstream, as `upstream_state` gives it."""
    if upstream is None:
        return Finding(Level.OK, "upstream", "none: runs are pushed")
    if upstream["reachable"]:
        took_ms = upstream["connected_in_s"] * 1000
        return Finding(Level.OK, "upstream", f"{upstream['place']} takes connections, in {took_ms:.1f} ms")
    return Finding(
        Level.FAIL, "upstream", f"{upstream['place']} takes no connection: {upstream['error']}",
        "Start it, or correct --upstream. It has to be reached from where relay runs.",
    )  # fmt: skip


# What is tried


async def examine(url: str, admin_url: str, public_url: str, token: str) -> list[Finding]:
    """A running relay: what it says of itself, and what a client behind `public_url` sees of it."""
    try:
        diagnostics = await get(f"{admin_url.rstrip('/')}/relay/v1/diagnostics", give_up_s=0, token=token)
    except (Unauthorized, Forbidden) as error:
        found = [
            Finding(Level.FAIL, "relay", f"{error.title}. {error.detail}", "Give an admin key: --token.")
        ]
    except RouteNotFound:
        found = [
            Finding(
                Level.FAIL, "relay", "does not tell of itself here",
                "Its administration has an address of its own: give it as --admin-url.",
            )
        ]  # fmt: skip
    except Unreachable as error:
        advice = "Start relay, or give --url as it is reached from here."
        return [Finding(Level.FAIL, "relay", error.detail, advice)]
    except RelayError as error:
        return [
            Finding(Level.FAIL, "relay", f"{error.title}. {error.detail}", "Is this the address of a relay?")
        ]
    else:
        found = judge(diagnostics)
    return [*found, *[finding async for finding in try_delivery(url, public_url, token)]]


async def try_delivery(url: str, public_url: str, token: str) -> AsyncIterator[Finding]:
    """Push a few words to a stream of our own, each when the one before has arrived, and read them as a
    browser does. What stands in between and gathers writes is found by the first that does not arrive."""
    stream = f"relay-doctor-{secrets.token_hex(8)}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        try:
            async with Producer(url, stream, session=session, give_up_s=0) as producer:
                yield await _deliver(session, _route(public_url, stream), producer)
        except (Unauthorized, Forbidden) as error:
            advice = "Give a key that may write and read: --token."
            yield Finding(Level.FAIL, "delivery", f"cannot be tried: {error.detail}", advice)
        except RelayError as error:
            yield Finding(Level.FAIL, "delivery", f"cannot be tried: {error.title}. {error.detail}")
        finally:
            try:
                async with asyncio.timeout(PATIENCE_S), session.delete(_route(url, stream)):
                    pass
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass  # it is gone with its retention


async def _deliver(session: aiohttp.ClientSession, route: str, producer: Producer) -> Finding:
    place = urlsplit(route).netloc
    advice = (
        "Something in between gathers what relay writes. Turn its buffering and compression off for event "
        "streams (nginx: proxy_buffering off; a CDN: no caching or transforming of text/event-stream)."
    )
    waited = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await session.get(
                f"{route}/events", params={"run": producer.run, "control": "none"},
                headers={"Accept": "text/event-stream", "Accept-Encoding": "gzip"},
            )  # fmt: skip
    except TimeoutError:
        return Finding(Level.FAIL, "delivery", f"{place} holds even the head of a stream back", advice)
    except (aiohttp.ClientError, OSError) as error:
        return Finding(Level.FAIL, "delivery", f"{place} cannot be read: {error}", "Is --public-url right?")
    async with answer:
        media_type = answer.headers.get("Content-Type", "").partition(";")[0]
        if answer.status != 200 or media_type != "text/event-stream":
            said = f"{place} answers {answer.status} {media_type}, and no event stream"
            return Finding(
                Level.FAIL, "delivery", said, "Is --public-url right, and does it lead to this relay?"
            )
        for number in range(PIECES):
            began = perf_counter()
            await producer.send(f"word {number}")
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await _until(answer, f"data: word {number}\n".encode())
            except TimeoutError:
                said = f"a word did not pass {place} within {PATIENCE_S:g} s of its own"
                return Finding(Level.FAIL, "delivery", said, advice)
            except (aiohttp.ClientError, EOFError):
                return Finding(
                    Level.FAIL, "delivery", f"{place} broke the stream off", "See its log and timeouts."
                )
            waited.append(perf_counter() - began)
    said = f"each write passes {place} on its own, in {max(waited) * 1000:.0f} ms at most"
    return Finding(Level.OK, "delivery", said)


async def _until(answer: aiohttp.ClientResponse, line: bytes) -> None:
    while (read := await answer.content.readline()) != line:
        if not read:
            raise EOFError


def _route(url: str, stream: str) -> str:
    return f"{url.rstrip('/')}/relay/v1/streams/{quote(stream, safe='')}"


# Settings of a relay that may not run yet


async def examine_settings(journal: Journal | None, sqlite_path: Path | None, upstream: str) -> list[Finding]:
    """What `relay serve` would meet from here with a Redis journal, or a file at `sqlite_path`, and an
    upstream. The file is not touched: a relay that runs has it locked."""
    found: list[Finding] = []
    if sqlite_path is not None:
        found.append(_examine_file(sqlite_path))
    if journal is not None:
        try:
            await journal.start(_Nobody())
        except StartupError as error:
            found.append(Finding(Level.FAIL, "journal", error.detail))
        else:
            try:
                found += judge_journal(await journal_state(journal))
            finally:
                await journal.close()
    if upstream:
        found.append(judge_upstream(await upstream_state(upstream)))
    return found


def _examine_file(path: Path) -> Finding:
    folder = path.absolute().parent
    if not folder.is_dir():
        return Finding(Level.FAIL, "journal", f"{folder} is not there", "Make it, and let relay write there.")
    return judge_disk(disk_usage(folder).free)


class _Nobody:
    """Follows nothing."""

    def on_frames(self, stream: str, previous: Any, frames: Sequence[Any]) -> None:
        pass

    def on_deleted(self, stream: str) -> None:
        pass

    def on_sealed(self, stream: str) -> None:
        pass

    def on_doubt(self, stream: str) -> None:
        pass


def tell(findings: Sequence[Finding], echo: Callable[[str], Any]) -> bool:
    """Print findings; whether nothing failed."""
    for finding in findings:
        for line in finding.lines():
            echo(line)
    return all(finding.level is not Level.FAIL for finding in findings)
