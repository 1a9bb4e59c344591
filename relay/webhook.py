"""The webhook: posts the transcript of each run that ended, so that a backend can keep what was shown.

As Standard Webhooks has it (standardwebhooks.com): the headers `webhook-id`, `webhook-timestamp` and
`webhook-signature`, at least once, retried with growing pauses. What is to be delivered stands in the
journal, so it survives this process, and any process delivers it: who claims a delivery has it for a while,
and when it dies with it, the next one gets it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import io
import ipaddress
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Sequence

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from relay.counts import DELIVERED, GIVEN_UP, RETRIED, Counts
from relay.errors import JournalError, StartupError, UnknownRun, UnknownStream
from relay.frame import timestamp
from relay.journal.base import Delivery, Journal
from relay.lifecycle import Status
from relay.settings import Settings
from relay.transcript import read_transcript

log = logging.getLogger("relay.webhook")

SECRET_PREFIX = "whsec_"
SECRET_BYTES = (24, 64)
"""Least and greatest length of a secret, as Standard Webhooks has it."""

DELAYS_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Pauses after the first tries; the last one is repeated."""
JITTER = 0.2
"""A pause is longer or shorter by up to this part of it."""

POLL_S = 5.0
"""How often the journal is asked for deliveries that nobody here knows of: retries, and those of the dead."""

CONCURRENT_MAX = 8
"""Deliveries under way; each holds one transcript."""

CLAIM_MARGIN_S = 30.0
"""A claim lasts so much longer than the receiver may take: the transcript is read within it."""

ANSWER_MAX_BYTES = 64 * 1024
"""Bytes of a receiver's answer that are read, and dropped, to keep the connection."""

POOLED_S = 1.5
"""An idle connection is kept so long: shorter than servers keep it (gunicorn 2 s, uvicorn and Node 5 s)."""

CLOSE_S = 2.0
"""What is under way at shutdown gets so long. What is not done then is delivered anew by the next process."""

_SECRET_ADVICE = (
    'Make one with `echo "whsec_$(openssl rand -base64 32)"` and give it to the receiver too. '
    "Two of them, with a space between, both sign: for changing from one to the other."
)
_PRIVATE_ADVICE = "--webhook-allow-private allows private, loopback and other addresses that are not public."

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+(%.+)?", re.ASCII)

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IETF_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")


class Webhook:
    """Delivers the endings of runs to one URL. `run` it as a task, and `wake` it when a run ended here.

    `wall_s` is the time that receivers compare with their own, in seconds since 1970; `jitter` gives numbers
    from 0 to 1. Raises `StartupError` for settings that cannot work."""

    def __init__(
        self,
        journal: Journal,
        settings: Settings,
        counts: Counts | None = None,
        *,
        wall_s: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        poll_s: float = POLL_S,
    ) -> None:
        self._journal = journal
        self._settings = settings
        self._counts = counts or Counts()
        self._url = _checked_url(settings.webhook_url, settings.webhook_allow_private)
        self._keys = _checked_secrets(settings.webhook_secret)
        self._wall_s = wall_s
        self._jitter = jitter
        self._poll_s = poll_s
        self._lease_s = settings.webhook_timeout_s + CLAIM_MARGIN_S
        self._news = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._more_due = False
        self._journal_away = False

    def wake(self) -> None:
        """A run ended: look for its delivery now."""
        self._news.set()

    async def run(self) -> None:
        """Deliver until cancelled; what is under way then gets a short while. The journal must be open until
        this has returned."""
        allow_private = self._settings.webhook_allow_private
        resolver = None if allow_private else PublicResolver(aiohttp.ThreadedResolver())
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=CONCURRENT_MAX, keepalive_timeout=POOLED_S, resolver=resolver
            ),
            timeout=aiohttp.ClientTimeout(total=self._settings.webhook_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        ) as session:
            try:
                while True:
                    self._news.clear()
                    await self._begin_due(session)
                    await self._wait()
            finally:
                await self._end_under_way()

    async def _begin_due(self, session: aiohttp.ClientSession) -> None:
        """Claim what is due, as much as there is room for, and begin to deliver it."""
        room = CONCURRENT_MAX - len(self._under_way)
        claimed: Sequence[Delivery] = ()
        if room:
            try:
                claimed = await self._journal.claim_deliveries(room, self._lease_s)
                self._journal_away = False
            except JournalError as error:
                if not self._journal_away:
                    log.warning("the journal is away, and deliveries wait: %s", error)
                self._journal_away = True
            except Exception:
                log.exception("no delivery can be claimed")
        self._more_due = len(claimed) == room
        for delivery in claimed:
            task = asyncio.create_task(self._deliver(session, delivery))
            self._under_way.add(task)
            task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._more_due:
            self._news.set()

    async def _wait(self) -> None:
        timer = asyncio.get_running_loop().call_later(self._poll_s, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    async def _end_under_way(self) -> None:
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _deliver(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        """Try once, and say in the journal what came of it. If that is not said, the claim lapses and the
        delivery is tried again."""
        stream, run, tries = delivery
        try:
            async with asyncio.timeout(self._lease_s):
                failure = await self._try(session, delivery)
        except (UnknownStream, UnknownRun):
            log.warning("not delivered, the run was removed stream=%s run=%s tries=%d", stream, run, tries)
            failure = ""
        except JournalError as error:
            log.warning("not delivered, the journal is away stream=%s run=%s: %s", stream, run, error)
            return
        except TimeoutError:
            failure = "it took longer than it was claimed for"
        except Exception as error:
            log.exception("not delivered stream=%s run=%s", stream, run)
            failure = f"relay failed: {type(error).__name__}"
        delay_s = delay_after(tries, self._settings.webhook_give_up_s) if failure else None
        try:
            if delay_s is not None:
                delay_s *= 1 + JITTER * (2 * self._jitter() - 1)
                log.warning(
                    "not delivered stream=%s run=%s tries=%d again_s=%.0f: %s",
                    stream, run, tries + 1, delay_s, failure,
                )  # fmt: skip
                self._counts.webhook_deliveries[RETRIED] += 1
                await self._journal.postpone_delivery(stream, run, delay_s)
                return
            if failure:
                log.error(
                    "never delivered, given up stream=%s run=%s tries=%d: %s", stream, run, tries + 1, failure
                )
                self._counts.webhook_deliveries[GIVEN_UP] += 1
            await self._journal.settle_delivery(stream, run)
        except JournalError as error:
            log.warning("the outcome is not noted stream=%s run=%s: %s", stream, run, error)

    async def _try(self, session: aiohttp.ClientSession, delivery: Delivery) -> str:
        """Post a run's transcript. Why it was not taken; empty when nothing is left to do."""
        stream, run, tries = delivery
        body = await self._body(stream, run)
        if not body:
            return "the journal was rewound, and the run is open"
        seconds = str(int(self._wall_s()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "relay",
            "webhook-id": run,
            "webhook-timestamp": seconds,
            "webhook-signature": signature(self._keys, run, seconds, body),
        }
        try:
            async with session.post(
                self._url, data=io.BytesIO(body), headers=headers, allow_redirects=False
            ) as answer:
                status = answer.status
                await _drop(answer)
        except TimeoutError:
            return f"no answer within {self._settings.webhook_timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _reason(error)
        if status == 410:
            log.warning("given up, the receiver wants no more stream=%s run=%s: it answered 410", stream, run)
            self._counts.webhook_deliveries[GIVEN_UP] += 1
            return ""
        if not 200 <= status <= 299:
            return f"the receiver answered {status}"
        log.info("delivered stream=%s run=%s tries=%d", stream, run, tries + 1)
        self._counts.webhook_deliveries[DELIVERED] += 1
        return ""

    async def _body(self, stream: str, run: str) -> bytes:
        transcript = await read_transcript(self._journal, stream, run, self._settings.transcript_max_bytes)
        if transcript.info.status is Status.OPEN:
            return b""
        ended = timestamp(transcript.info.ended_ms)
        return orjson.dumps({"type": "run.ended", "timestamp": ended, "data": transcript.document()})


def signature(keys: Sequence[bytes], message_id: str, seconds: str, body: bytes) -> str:
    """The header `webhook-signature`: one signature a key."""
    signed = []
    for key in keys:
        mac = hmac.new(key, f"{message_id}.{seconds}.".encode(), hashlib.sha256)
        mac.update(body)
        signed.append("v1," + base64.b64encode(mac.digest()).decode())
    return " ".join(signed)


def delay_after(tries: int, give_up_s: float) -> float | None:
    """The pause after a try that failed, when `tries` had failed before; None when the next one would come
    later than `give_up_s` after the first. Counted in pauses, so that no clock can cut the tries short."""
    waited_s = sum(DELAYS_S[:tries]) + max(0, tries - len(DELAYS_S)) * DELAYS_S[-1]
    delay_s = DELAYS_S[min(tries, len(DELAYS_S) - 1)]
    return delay_s if waited_s + delay_s <= give_up_s else None


class PublicResolver(AbstractResolver):
    """Resolves to public addresses only. It stands between the answer of DNS and the connection, so an answer
    that changes in between changes nothing."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises `OSError` when no address is public."""
        found = await self._inner.resolve(host, port, family)
        public = [address for address in found if is_public(address["host"])]
        if not public:
            raise OSError(f"{host} has no public address. {_PRIVATE_ADVICE}")
        return public

    async def close(self) -> None:
        await self._inner.close()


def is_public(address: str) -> bool:
    """Whether an IP address, in text, is one of the public internet. Raises `ValueError` if it is none."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None and ip not in _NAT64:
            return ip in _GLOBAL_UNICAST and ip.is_global and ip.sixtofour is None
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip.is_global and not ip.is_multicast and ip not in _IETF_PROTOCOLS


def _checked_url(text: str, allow_private: bool) -> URL:
    # The URL may hold a secret, so no message repeats it.
    try:
        url = URL(text)
        host = url.raw_host or ""
        valid = url.scheme in ("http", "https") and _HOST.fullmatch(host) is not None
    except ValueError:
        valid = False
    if not valid:
        raise StartupError("--webhook-url is not an http:// or https:// URL.")
    if allow_private:
        return url
    try:
        private = not is_public(host)
    except ValueError:
        name = host.rstrip(".").lower()
        # Numbers that are no address as such are made one below us, where nobody looks at them.
        numeric = name.replace(".", "").isdigit()
        private = numeric or name == "localhost" or name.endswith(".localhost")
    if private:
        raise StartupError(f"--webhook-url names an address that is not public. {_PRIVATE_ADVICE}")
    return url


def _checked_secrets(text: str) -> list[bytes]:
    secrets = text.split()
    if not secrets:
        raise StartupError(f"--webhook-url needs a --webhook-secret. {_SECRET_ADVICE}")
    keys = []
    for secret in secrets:
        encoded = secret.removeprefix(SECRET_PREFIX)
        try:
            key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except binascii.Error:
            key = b""
        if not secret.startswith(SECRET_PREFIX) or not SECRET_BYTES[0] <= len(key) <= SECRET_BYTES[1]:
            raise StartupError(
                f"--webhook-secret is not {SECRET_PREFIX} and the base64 of {SECRET_BYTES[0]} to "
                f"{SECRET_BYTES[1]} bytes. {_SECRET_ADVICE}"
            )
        keys.append(key)
    return keys


async def _drop(answer: aiohttp.ClientResponse) -> None:
    """Read an answer's body up to a bound, so that its connection can be used again. The status has said it
    all, so a body that breaks off is no failure."""
    try:
        left = ANSWER_MAX_BYTES
        while left > 0:
            data = await answer.content.read(left)
            if not data:
                return
            left -= len(data)
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass
    answer.close()


def _reason(error: Exception) -> str:
    """What went wrong, without the URL that aiohttp's own words may hold."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error}"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the receiver's answer is not valid HTTP"
    return f"the connection broke: {type(error).__name__}"
