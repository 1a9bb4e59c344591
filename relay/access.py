"""What stands before every request: its Host, the site it comes from, how often its client asks, and, on
relay's own routes, whether who sends it may do this.

Credentials are taken from `Relay-Authorization`; on relay's own routes from `Authorization` too; from the
cookie that `POST /relay/v1/session` sets; and, to read only, from `?token=`. The first of them that is there
counts. On proxied paths `Authorization` is upstream's.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from relay.errors import (
    CallerError,
    CrossOrigin,
    Forbidden,
    HostNotAllowed,
    StartupError,
    TooManyRequests,
    Unauthorized,
    unknown_stream,
)
from relay.headers import Headers, all_of, first_of
from relay.replay.response import Scope
from relay.security import EVERYTHING, ForwardAuth, Grant, Keyring, Question, Right
from relay.settings import Settings

COOKIE = "relay_token"

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

BURST_S = 10.0
"""A client that was quiet may make the requests of so long at once."""

CLIENTS_MAX = 50_000
"""Clients whose requests are counted; the one that was quiet for longest is forgotten first."""

PREFLIGHT_S = 600
"""How long a browser may keep the answer to a preflight."""

EXPOSED = (
    "Relay-Stream", "Relay-Run", "Relay-Cursor", "Relay-Frames-After", "Relay-Token", "Relay-Journal",
    "Retry-After",
)  # fmt: skip
"""Headers of relay's that a page of another origin may read."""

_ASKED = (
    "Authorization", "Relay-Authorization", "Content-Type", "Last-Event-ID", "Idempotency-Key", "Prefer",
    "Relay-Writer", "Relay-Seq", "Relay-Supersedes", "Relay-If-Busy", "Relay-Stream", "Relay-Dialect",
)  # fmt: skip

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII)

_LOCAL_NAMES = ("localhost", "*.localhost")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Presented(NamedTuple):
    """A credential and where it stood: `header`, `cookie` or `url`."""

    value: str
    place: str


class Access:
    """The rules of one relay. `now` is a clock that does not jump."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._keyring = Keyring(settings)
        self._forward = ForwardAuth(settings) if settings.auth_url else None
        self._origins = tuple(_origin(text) for text in settings.cors_origin)
        self._hosts = tuple(_host(text) for text in settings.allowed_host)
        if self._hosts or (not self.is_required and is_loopback(settings.host)):
            # A page whose name its owner has lead to this machine would be let in for the address it has.
            self._hosts += _LOCAL_NAMES
        self._proxies = [_network(text) for text in settings.trusted_proxy]
        self._rate = Rate(settings.client_requests_per_s, now) if settings.client_requests_per_s else None

    @property
    def is_required(self) -> bool:
        """Whether there is authentication at all."""
        return bool(self._keyring) or self._forward is not None

    async def close(self) -> None:
        """Let go of connections."""
        await self._keyring.close()
        if self._forward is not None:
            await self._forward.close()

    # Before anything else

    def admit(self, scope: Scope) -> None:
        """Raises `HostNotAllowed` for a request that is meant for another host, `TooManyRequests`."""
        self._check_host(all_of(scope["headers"], b"host"))
        if self._rate is not None:
            self._rate.take(self.client(scope))

    def _check_host(self, given: list[str]) -> None:
        if not self._hosts or not given:
            return  # a browser always says it, since HTTP/1.1
        found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        name = found[1].lower() if found else ""
        if not name or not (_is_address(name) or any(_covers(host, name) for host in self._hosts)):
            raise HostNotAllowed(
                f"The host {', '.join(given)!r} is not served here; --allowed-host names those that are."
            )

    def client(self, scope: Scope) -> str:
        """The address of who asks; behind a trusted proxy the one that the proxy tells."""
        client = scope.get("client")
        address = client[0] if client else ""
        forwarded = ",".join(all_of(scope["headers"], b"x-forwarded-for")) if self._proxies else ""
        for hop in reversed([hop.strip() for hop in forwarded.split(",") if hop.strip()]):
            if not _is_in(address, self._proxies):
                break
            address = hop
        return address

    # Rights

    async def grant(self, scope: Scope, right: Right, stream: str = "") -> Grant:
        """What allows this request to do something, to a stream unless it is for the administrator.

        A stream that the credential does not concern answers as one that does not exist. Raises
        `Unauthorized`, `Forbidden`, `UnknownStream`, `CrossOrigin`, `AuthUnavailable`."""
        headers: Headers = scope["headers"]
        presented = _presented(scope, headers)
        if presented is None or presented.place != "header":  # all that a foreign page can have sent
            has_cookie = self.is_required and bool(first_of(headers, b"cookie"))
            self._check_origin(scope["method"], headers, has_cookie)
        if not self.is_required:
            return EVERYTHING
        grant = await self._granted(scope, headers, presented, right, stream)
        if stream and not grant.covers(stream):
            if right is Right.WRITE:
                raise Forbidden("The credential is not for this stream.")
            raise unknown_stream(stream)
        if right not in grant.rights:
            raise Forbidden(f"The credential does not allow this: it needs {right.value!r}.")
        return grant

    async def _granted(
        self, scope: Scope, headers: Headers, presented: Presented | None, right: Right, stream: str
    ) -> Grant:
        refused = Unauthorized("This needs a credential.")
        if presented is not None and self._keyring:
            try:
                grant = await self._keyring.grant(presented.value)
                return self._keyring.for_url(grant) if presented.place == "url" else grant
            except Unauthorized as error:
                if first_of(headers, b"relay-authorization") or presented.place == "url":
                    raise
                refused = error  # it may be the application's own
        if self._forward is None or not stream:
            raise refused
        query: bytes = scope["query_string"]
        question = Question(
            authorization=first_of(headers, b"authorization"),
            cookie=without_cookie("; ".join(all_of(headers, b"cookie"))),
            method=scope["method"],
            target=scope["raw_path"].decode("latin-1") + ("?" + query.decode("latin-1") if query else ""),
            host=first_of(headers, b"host"),
            client=self.client(scope),
            right=right,
            stream=stream,
        )
        try:
            return await self._forward.grant(question)
        except Forbidden:
            if right is Right.WRITE:
                raise
            raise unknown_stream(stream) from None

    async def may_name(self, scope: Scope, stream: str) -> bool:
        """Whether who sends a request to upstream may say itself which stream the answer goes to: with the
        right to write; without authentication, from this machine, and not for somebody else."""
        if self.is_required:
            return await self.may(scope, Right.WRITE, stream)
        headers, client = scope["headers"], scope.get("client")
        forwarded = all_of(headers, b"x-forwarded-for") or all_of(headers, b"forwarded")
        return not forwarded and client is not None and is_loopback(client[0])

    async def may(self, scope: Scope, right: Right, stream: str) -> bool:
        """Whether who sends a request to upstream may do this by a credential of relay's, or because the
        application says so; anybody may without authentication. Raises `AuthUnavailable`."""
        if not self.is_required:
            return True
        try:
            await self.grant(scope, right, stream)
        except CallerError:
            return False
        return True

    async def check_named(self, scope: Scope, stream: str) -> None:
        """Have the application agree that a request which it is going to answer names this stream. Raises
        `Unauthorized`, `Forbidden`, `AuthUnavailable`."""
        if self._forward is not None:
            await self.grant(scope, Right.WRITE, stream)

    def token_for(self, stream: str) -> str:
        """A token for who was just given an answer of a stream, or ""."""
        return self._keyring.token_for(stream)

    async def exchange(self, scope: Scope) -> Headers:
        """The head of the answer that makes a cookie of a token. Raises `Unauthorized`, `AuthUnavailable`."""
        presented = _in_header(scope["headers"])
        if presented is None:
            raise Unauthorized("Send a token in Authorization to have it in a cookie.")
        grant = await self._keyring.grant(presented)
        if grant.expires_at is None:
            raise Unauthorized("A key is not made a cookie of; use a token.")
        return [(b"set-cookie", _cookie(scope, presented, max(0, int(grant.expires_at - time.time()))))]

    @staticmethod
    def forget(scope: Scope) -> Headers:
        """The head of the answer that takes the cookie back."""
        return [(b"set-cookie", _cookie(scope, "", 0))]

    # Sites

    def _check_origin(self, method: str, headers: Headers, has_cookie: bool) -> None:
        """Refuse what a page of another site has a browser do, who may reach what the page may not, or whose
        cookies go along. Raises `CrossOrigin`."""
        if method in SAFE_METHODS:
            return
        site, origin = first_of(headers, b"sec-fetch-site"), first_of(headers, b"origin")
        if origin in self._origins or (origin and not has_cookie and self.allows_origin(origin)):
            return
        if site:
            is_own = site in ("same-origin", "none")
        elif origin:
            is_own = urlsplit(origin).netloc.lower() == first_of(headers, b"host").lower()
        elif has_cookie:
            raise CrossOrigin(
                "A request with a cookie has to say where it comes from: Origin, Sec-Fetch-Site."
            )
        else:
            is_own = True  # no browser
        if not is_own:
            raise CrossOrigin("A page of another origin may not do this; --cors-origin names those that may.")

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of an origin may use relay's own routes."""
        return origin in self._origins or "*" in self._origins

    def cors(self, scope: Scope) -> Headers:
        """The headers that let a page of an allowed origin see the answer."""
        origin = first_of(scope["headers"], b"origin")
        if not origin or not self.allows_origin(origin):
            return [(b"vary", b"Origin")] if self._origins else []
        exposing = [(b"access-control-expose-headers", ", ".join(EXPOSED).encode()), (b"vary", b"Origin")]
        if origin in self._origins:
            exposing.append((b"access-control-allow-credentials", b"true"))
        else:
            origin = "*"  # whoever it is: without cookies
        return [(b"access-control-allow-origin", origin.encode("latin-1")), *exposing]

    def is_preflight(self, scope: Scope) -> bool:
        """Whether a browser asks if a page may send a request to relay's own routes (Fetch, 3.3.2)."""
        headers: Headers = scope["headers"]
        asked = first_of(headers, b"access-control-request-method") and first_of(headers, b"origin")
        return scope["method"] == "OPTIONS" and bool(asked)

    def preflight(self, scope: Scope) -> Headers:
        """The head of the answer to a preflight, beside `cors`. Raises `CrossOrigin`."""
        if not self.allows_origin(first_of(scope["headers"], b"origin")):
            raise CrossOrigin("Pages of this origin may not; --cors-origin names those that may.")
        return [
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", ", ".join(_ASKED).encode()),
            (b"access-control-max-age", b"%d" % PREFLIGHT_S),
        ]


class Rate:
    """How often each client asks: so often a second on average, and ten seconds' worth at once. Of IPv6 it is
    the network of 64 bits that is counted, because each customer has one of them."""

    def __init__(self, per_s: float, now: Callable[[], float]) -> None:
        self._per_s = per_s
        self._now = now
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request. Raises `TooManyRequests`."""
        now, client = self._now(), _network_of(client)
        # When this client's bucket is full again; one request delays that by its share of a second.
        full_at = max(now, self._full_at.get(client, now)) + 1 / self._per_s
        if full_at - now > max(BURST_S, 1 / self._per_s):
            raise TooManyRequests("This client asks too often.")
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        if len(self._full_at) > CLIENTS_MAX:
            self._full_at.popitem(last=False)


def without_own_cookie(headers: Headers) -> Headers:
    """A request's headers as upstream may see them: without relay's cookie."""
    own = COOKIE.encode()
    if not any(name == b"cookie" and own in value for name, value in headers):
        return headers
    kept = []
    for name, value in headers:
        if name == b"cookie":
            value = without_cookie(value.decode("latin-1")).encode("latin-1")
            if not value:
                continue
        kept.append((name, value))
    return kept


def without_cookie(cookies: str) -> str:
    """A Cookie header's value without relay's cookie, which upstream never sees."""
    if COOKIE not in cookies:
        return cookies
    return "; ".join(part for part in _parts(cookies) if part.partition("=")[0].strip() != COOKIE)


def _parts(cookies: str) -> Iterator[str]:
    return (part.strip() for part in cookies.split(";") if part.strip())


def _presented(scope: Scope, headers: Headers) -> Presented | None:
    if first_of(headers, b"relay-authorization"):
        return Presented(_bearer(first_of(headers, b"relay-authorization")), "header")
    is_ours = scope["path"].startswith("/relay/")
    value = _in_header(headers) if is_ours else None
    if value is not None:
        return Presented(value, "header")
    if own := set(_own_cookies(headers)):
        if len(own) > 1:
            # A neighbour's page (another host of the same site) can set one beside ours.
            raise Unauthorized(f"There are several different cookies {COOKIE}.")
        return Presented(own.pop(), "cookie")
    if b"token=" in scope["query_string"]:
        for name, value in parse_qsl(scope["query_string"].decode("latin-1")):
            if name == "token":
                return Presented(value, "url")
    return None


def _own_cookies(headers: Headers) -> Iterator[str]:
    for cookies in all_of(headers, b"cookie"):
        for part in _parts(cookies):
            name, _, value = part.partition("=")
            if name.strip() == COOKIE:
                yield value.strip()


def _in_header(headers: Headers) -> str | None:
    """The credential in `Authorization`, if it is of the scheme that ours are of."""
    authorization = first_of(headers, b"relay-authorization") or first_of(headers, b"authorization")
    return _bearer(authorization) if authorization[:7].lower() == "bearer " else None


def _bearer(authorization: str) -> str:
    scheme, _, credential = authorization.partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def _cookie(scope: Scope, token: str, life_s: int) -> bytes:
    """`Set-Cookie` for a token that was verified, so holds no character that cookies may not."""
    found = _HOST.fullmatch(first_of(scope["headers"], b"host"))
    # A browser keeps a Secure cookie of its own machine too, but not every one does without TLS.
    secure = "" if found and is_loopback(found[1]) else "; Secure"
    return f"{COOKIE}={token}; Path=/; Max-Age={life_s}; HttpOnly; SameSite=Strict{secure}".encode("latin-1")


def _host(text: str) -> str:
    name = text.removeprefix("*.")
    if _HOST.fullmatch(name) is None or ":" in name.rpartition("]")[2]:
        raise StartupError(f"--allowed-host {text!r}: write a name, such as app.example, or *.app.example.")
    return text.lower()


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (not parts.scheme or not parts.netloc or text != f"{parts.scheme}://{parts.netloc}"):
        raise StartupError(f"--cors-origin {text!r}: write an origin, such as https://app.example, or *.")
    return text


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise StartupError(f"--trusted-proxy {text!r}: {error}") from None


def _is_in(address: str, networks: list[Network]) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in networks)


def _network_of(client: str) -> str:
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host, as a name or an address, is this machine."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _covers(pattern: str, name: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
