"""Who may do what: keys, tokens (JWT), and the question put to an application that has a login of its own.

A `Grant` says what a credential allows. `Keyring` reads one from a key or token, `ForwardAuth` asks for one.
Formats: RFC 7519 (JWT), RFC 7517 (JWKS), RFC 6750 (bearer), RFC 8693 section 4.2 (`scope`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from relay.errors import AuthUnavailable, Forbidden, StartupError, Unauthorized
from relay.settings import Settings

log = logging.getLogger("relay.security")

SECRET_MIN_BYTES = 32
"""Shortest HS256 secret (RFC 7518 section 3.2)."""

KEY_MIN_CHARS = 16
"""Shortest producer or admin key."""

LEEWAY_S = 5.0
"""How far the clocks of those who make tokens may be off."""

CREDENTIAL_MAX_CHARS = 8192
"""Longest key or token that is looked at."""

URL_TOKEN_MAX_S = 3600.0
"""Longest life of a token that stands in a URL, where it may be seen and kept."""

JWKS_AGAIN_S = 10.0
"""Published keys are asked for at most so often because of a key that is not known."""

JWKS_OLD_S = 600.0
"""Published keys are asked for again when they are so old, so that those taken back are."""

ASK_S = 5.0
"""Longest wait for an answer about keys or access."""

ANSWER_MAX_BYTES = 256 * 1024
"""Largest answer with published keys."""

DECISIONS_MAX = 20_000
"""Decisions on access that are remembered."""

TIME_MAX = 2**53
"""Largest time that a token may hold, in seconds."""

# RFC 7515 section 3.1. A token may become a cookie: how leniently base64 is read is not left to libraries.
_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)

_PATTERN = re.compile(r"[A-Za-z0-9._~:*-]{1,200}", re.ASCII)


class Right(StrEnum):
    """What may be done. `admin` is what concerns no single stream."""

    READ = "read"
    WRITE = "write"
    CANCEL = "cancel"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a credential allows: `rights`, in the streams whose names match one of `streams`, in which `*`
    stands for any characters. `expires_at` is a time in seconds since the epoch; `subject` says whose it is,
    "" for nobody's in particular. `renewable` says that whoever gave it is to be asked again then, and that
    the client may well come back."""

    rights: frozenset[Right]
    streams: tuple[str, ...] = ("*",)
    expires_at: float | None = None
    subject: str = ""
    renewable: bool = False

    def covers(self, stream: str) -> bool:
        """Whether it concerns a stream."""
        return any(_matches(pattern, stream) for pattern in self.streams)


EVERYTHING = Grant(frozenset(Right))
"""Of who holds the admin key, and of everybody where there is no authentication."""

PRODUCER = Grant(frozenset((Right.READ, Right.WRITE, Right.CANCEL)))
"""Of who holds a producer key."""


def _matches(pattern: str, name: str) -> bool:
    if "*" not in pattern:
        return pattern == name
    first, *middle, last = pattern.split("*")
    if len(name) < len(first) + len(last) or not (name.startswith(first) and name.endswith(last)):
        return False
    place, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, place, end)
        if found < 0:
            return False
        place = found + len(part)
    return True


def mint(
    secret: str,
    rights: Iterable[Right],
    streams: Sequence[str],
    life_s: float,
    *,
    audience: str,
    issuer: str = "",
    subject: str = "",
    now: float | None = None,
) -> str:
    """A token (HS256). Raises `ValueError` for a secret too short, and for patterns that match nothing."""
    if len(secret.encode()) < SECRET_MIN_BYTES:
        raise ValueError(f"A secret has {SECRET_MIN_BYTES} bytes or more.")
    for pattern in streams:
        if _PATTERN.fullmatch(pattern) is None:
            raise ValueError(f"{pattern!r} is no stream name, nor a pattern of them.")
    issued = time.time() if now is None else now
    claims: dict[str, Any] = {
        "aud": audience, "iat": int(issued), "exp": int(issued + life_s),
        "scope": " ".join(sorted(rights)), "streams": list(streams),
    }  # fmt: skip
    if issuer:
        claims["iss"] = issuer
    if subject:
        claims["sub"] = subject
    return jwt.encode(claims, secret, "HS256")


class Keyring:
    """Reads grants from keys and tokens. `now` is the time in seconds since the epoch."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        self._secret = settings.jwt_secret
        self._token_s = settings.token_s
        self._keys: list[tuple[bytes, Grant]] = []
        for flag, keys, grant in (
            ("--producer-key", settings.producer_key, PRODUCER),
            ("--admin-key", settings.admin_key, EVERYTHING),
        ):
            for key in keys:
                if len(key) < KEY_MIN_CHARS or not key.isascii() or " " in key:
                    raise StartupError(
                        f"{flag}: a key is {KEY_MIN_CHARS} or more ASCII characters, no space."
                    )
                self._keys.append((_digest(key), grant))
        if self._secret and len(self._secret.encode()) < SECRET_MIN_BYTES:
            raise StartupError(f"--jwt-secret: a secret has {SECRET_MIN_BYTES} bytes or more.")
        self._public = _public_key(settings.jwt_public_key)
        self._published = PublishedKeys(settings.jwks_url) if settings.jwks_url else None

    def __bool__(self) -> bool:
        """Whether there is anything to verify a credential with."""
        return bool(self._keys or self._secret or self._public or self._published)

    async def close(self) -> None:
        """Let go of connections."""
        if self._published is not None:
            await self._published.close()

    async def grant(self, credential: str) -> Grant:
        """What a key or a token allows. Raises `Unauthorized`, `AuthUnavailable`."""
        if len(credential) > CREDENTIAL_MAX_CHARS:
            raise Unauthorized("The credential is too long.")
        presented = _digest(credential)
        found = None
        for digest, grant in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(digest, presented):
                found = grant
        return found or await self._token(credential)

    async def _token(self, token: str) -> Grant:
        refused = Unauthorized("The credential is no key and no token of this relay.")
        if _TOKEN.fullmatch(token) is None:
            raise refused
        try:
            head = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, RecursionError):
            raise refused from None
        key, algorithm = await self._verifier(head)
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer or None,
                leeway=LEEWAY_S,
                # By our own clock, below.
                options={
                    "require": ["exp", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.PyJWTError as error:
            raise Unauthorized(f"The token is not valid: {error}.") from None
        return self._granted(claims)

    async def _verifier(self, head: dict[str, Any]) -> tuple[Any, str]:
        """The key for a token, and the one algorithm that it may be used with: the token chooses among keys
        that are there, never how one is used (RFC 8725 section 3.1)."""
        algorithm = head.get("alg")
        if algorithm == "HS256" and self._secret:
            return self._secret, "HS256"
        if self._public is not None and algorithm == self._public[1]:
            return self._public
        if self._published is not None and algorithm in ("RS256", "EdDSA"):
            key = await self._published.find(head.get("kid"), algorithm)
            if key is not None:
                return key, algorithm
        raise Unauthorized("The token is signed by nobody who is known here.")

    def _granted(self, claims: dict[str, Any]) -> Grant:
        expires_at, begins_at = claims["exp"], claims.get("nbf", 0)
        for moment in (expires_at, begins_at):
            if not isinstance(moment, int | float) or not abs(moment) < TIME_MAX:  # nor NaN
                raise Unauthorized("The token's times are not times.")
        if expires_at + LEEWAY_S <= self._now():
            raise Unauthorized("The token has expired.")
        if begins_at - LEEWAY_S > self._now():
            raise Unauthorized("The token is not valid yet.")
        subject = claims.get("sub", "")
        rights = frozenset(right for right in Right if right in _words(claims.get("scope")))
        return Grant(rights, tuple(_words(claims.get("streams"))), expires_at, str(subject))

    def for_url(self, grant: Grant) -> Grant:
        """A grant whose token stood in a URL. Raises `Unauthorized` for one that should not stand there."""
        if grant.rights != {Right.READ} or grant.expires_at is None:
            raise Unauthorized("Only a token that can do no more than read may stand in a URL.")
        if grant.expires_at > self._now() + URL_TOKEN_MAX_S + LEEWAY_S:
            raise Unauthorized(f"A token in a URL expires within {URL_TOKEN_MAX_S:g} s.")
        return grant

    def token_for(self, stream: str) -> str:
        """A token for who was given an answer of this stream; "" where there is no secret to sign with."""
        if not self._secret:
            return ""
        rights = (Right.READ, Right.CANCEL)
        return mint(
            self._secret, rights, [stream], self._token_s,
            audience=self._audience, issuer=self._issuer, now=self._now(),
        )  # fmt: skip


def _digest(credential: str) -> bytes:
    return hashlib.sha256(credential.encode(errors="replace")).digest()


def _words(claim: Any) -> list[str]:
    """A claim that is words with spaces between, or a list of them."""
    if isinstance(claim, str):
        return claim.split()
    return [word for word in claim if isinstance(word, str)] if isinstance(claim, list) else []


def _public_key(path: str) -> tuple[RSAPublicKey | Ed25519PublicKey, str] | None:
    if not path:
        return None
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"--jwt-public-key {path}: {error}") from None
    if isinstance(key, RSAPublicKey):
        return key, "RS256"
    if isinstance(key, Ed25519PublicKey):
        return key, "EdDSA"
    raise StartupError(f"--jwt-public-key {path}: relay verifies with RSA and Ed25519 keys.")


class PublishedKeys:
    """The keys that a URL publishes (RFC 7517), asked for when they are needed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None
        self._keys: dict[tuple[str | None, str], Any] = {}
        self._fetched_at: float | None = None
        self._asked_at: float | None = None
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Let go of the connection."""
        if self._session is not None:
            await self._session.close()

    async def find(self, kid: Any, algorithm: str) -> Any | None:
        """The key of a name, or the only one there is for a token that names none. Raises `AuthUnavailable`
        when it cannot be found out."""
        if not self._are_fresh():
            await self._ask()
        found = self._named(kid, algorithm)
        if found is None and self._may_ask_again():
            await self._ask()  # keys are published before they are used: this one may be new
            found = self._named(kid, algorithm)
        return found

    def _named(self, kid: Any, algorithm: str) -> Any | None:
        if kid is not None:
            return self._keys.get((kid, algorithm)) if isinstance(kid, str) else None
        candidates = [key for (_, of), key in self._keys.items() if of == algorithm]
        return candidates[0] if len(candidates) == 1 else None

    def _are_fresh(self) -> bool:
        return self._fetched_at is not None and time.monotonic() - self._fetched_at < JWKS_OLD_S

    def _may_ask_again(self) -> bool:
        return self._asked_at is None or time.monotonic() - self._asked_at >= JWKS_AGAIN_S

    async def _ask(self) -> None:
        async with self._asking:
            if self._asked_at is None or self._may_ask_again():
                self._asked_at = time.monotonic()
                try:
                    self._keys = await self._fetch()
                    self._fetched_at = time.monotonic()
                except (aiohttp.ClientError, OSError, ValueError, jwt.PyJWTError) as error:
                    log.warning(
                        "keys cannot be fetched from --jwks-url: %s", str(error) or type(error).__name__
                    )
        if self._fetched_at is None:
            raise AuthUnavailable("The keys that verify tokens cannot be fetched.")

    async def _fetch(self) -> dict[tuple[str | None, str], Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S))
        async with self._session.get(self._url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"it answers {response.status}")
            text = bytearray()
            async for data in response.content.iter_chunked(64 * 1024):
                text += data
                if len(text) > ANSWER_MAX_BYTES:
                    raise ValueError(f"its answer is longer than {ANSWER_MAX_BYTES} bytes")
        keys: dict[tuple[str | None, str], Any] = {}
        for key in jwt.PyJWKSet.from_json(text.decode()).keys:
            for kind, algorithm in ((RSAPublicKey, "RS256"), (Ed25519PublicKey, "EdDSA")):
                if isinstance(key.key, kind):
                    keys[key.key_id, algorithm] = key.key
        return keys


@dataclass(frozen=True, slots=True)
class Question:
    """What an application is asked: may who sends this request, with these credentials, do this?"""

    authorization: str
    cookie: str
    method: str
    target: str
    host: str
    client: str
    right: Right
    stream: str

    @property
    def of_who(self) -> bytes:
        """What the answer may depend on. Where the request goes is not part of it: `right` and `stream` say
        what of that matters."""
        parts = (self.authorization, self.cookie, self.right, self.stream, self.host, self.client)
        return hashlib.sha256("\0".join(parts).encode(errors="replace")).digest()


class ForwardAuth:
    """Asks an application's own endpoint, as reverse proxies do: 2xx is yes, 401 and 403 (and 404) are no."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.auth_url
        self._cache_s = settings.auth_cache_s
        self._recheck_s = settings.auth_recheck_s
        self._session: aiohttp.ClientSession | None = None
        self._decided: dict[bytes, tuple[float, int]] = {}
        self._asked: dict[bytes, asyncio.Task[int]] = {}

    async def close(self) -> None:
        """Let go of connections."""
        if self._session is not None:
            await self._session.close()

    async def grant(self, question: Question) -> Grant:
        """What the application allows. Raises `Unauthorized`, `Forbidden`, `AuthUnavailable`."""
        status = await self._status(question)
        if 200 <= status < 300:
            expires_at = time.time() + self._recheck_s
            return Grant(frozenset((question.right,)), (question.stream,), expires_at, renewable=True)
        if status == 401:
            raise Unauthorized("The application does not know who sends this.")
        if status in (403, 404):
            raise Forbidden("The application does not allow this.")
        raise AuthUnavailable("The application cannot say who may do this.")

    async def _status(self, question: Question) -> int:
        key, now = question.of_who, time.monotonic()
        decided = self._decided.get(key)
        if decided is not None and now < decided[0]:
            return decided[1]
        asked = self._asked.get(key)
        if asked is None:  # many readers may come back at once
            asked = self._asked[key] = asyncio.create_task(self._ask(question))
            asked.add_done_callback(lambda _: self._asked.pop(key, None))
        status = await asyncio.shield(asked)
        if self._cache_s and (status < 300 or status in (401, 403, 404)):
            self._decided.pop(key, None)
            self._decided[key] = (now + self._cache_s, status)
            if len(self._decided) > DECISIONS_MAX:
                del self._decided[next(iter(self._decided))]
        return status

    async def _ask(self, question: Question) -> int:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=ASK_S),
                connector=aiohttp.TCPConnector(limit=100),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {
            "X-Forwarded-Method": question.method,
            "X-Forwarded-Uri": question.target,
            "X-Forwarded-Host": question.host,
            "X-Forwarded-For": question.client,
            "Relay-Right": question.right,
            "Relay-Stream": question.stream,
        }
        if question.authorization:
            headers["Authorization"] = question.authorization
        if question.cookie:
            headers["Cookie"] = question.cookie
        try:
            async with self._session.get(self._url, headers=headers, allow_redirects=False) as response:
                return response.status
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.warning("--auth-url cannot be asked: %s", str(error) or type(error).__name__)
            return 503
