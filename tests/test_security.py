"""Keys, tokens and forward-auth: what a credential grants, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay import security
from relay.errors import AuthUnavailable, Forbidden, StartupError, Unauthorized
from relay.security import EVERYTHING, PRODUCER, ForwardAuth, Grant, Keyring, Question, Right, mint
from relay.settings import Settings

SECRET = "a secret of sixty-four bytes, which is what HS512 would want of it"
NOW = 1_800_000_000.0

Signing = RSAPrivateKey | Ed25519PrivateKey


@pytest.fixture(scope="module")
def rsa() -> RSAPrivateKey:
    return generate_rsa_key(65537, 2048)


@pytest.fixture(scope="module")
def ed25519() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def claims(**more: Any) -> dict[str, Any]:
    given = {"aud": "relay", "exp": NOW + 60, "scope": "read", "streams": ["s"]} | more
    return {name: value for name, value in given.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key, algorithm, headers={} if kid is None else {"kid": kid})


def keyring(**settings: Any) -> Keyring:
    return Keyring(Settings(**settings), lambda: NOW)


def grant_of(token: str, **settings: Any) -> Grant:
    async def ask() -> Grant:
        ring = keyring(**({"jwt_secret": SECRET} | settings))
        try:
            return await ring.grant(token)
        finally:
            await ring.close()

    return asyncio.run(ask())


def in_base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# Patterns


@pytest.mark.parametrize(
    ("pattern", "covered", "left_out"),
    [
        ("chat-1", ["chat-1"], ["chat-10", "chat-", "xchat-1", "CHAT-1"]),
        ("chat-*", ["chat-", "chat-1", "chat-1.turn-2"], ["chat", "xchat-1"]),
        ("*", ["a", "a.b"], []),
        ("*.logs", ["a.logs", ".logs"], ["a.log", "a.logs.b"]),
        ("a*b*c", ["abc", "a1b2c", "abbc", "abcbc"], ["ab", "acb", "abcd"]),
        ("ab*ba", ["abba", "ab1ba"], ["aba"]),
        ("user.1", ["user.1"], ["userx1"]),
    ],
)
def test_a_pattern_covers_names_and_no_others(pattern: str, covered: list[str], left_out: list[str]) -> None:
    grant = replace(EVERYTHING, streams=(pattern,))
    assert [name for name in [*covered, *left_out] if grant.covers(name)] == covered


def test_a_grant_of_no_stream_covers_none() -> None:
    assert not replace(EVERYTHING, streams=()).covers("s")


# Keys


def test_keys_grant_what_their_holders_need() -> None:
    keys = {"producer_key": ("producer-key-0001", "producer-key-0002"), "admin_key": ("admin-key-00000001",)}
    assert grant_of("producer-key-0002", **keys) is PRODUCER
    assert grant_of("admin-key-00000001", **keys) is EVERYTHING
    assert Right.ADMIN not in PRODUCER.rights


@pytest.mark.parametrize(
    "wrong", ["", "producer-key-000", "producer-key-00011", "Producer-Key-0001", "x" * 10_000]
)
def test_a_wrong_key_grants_nothing(wrong: str) -> None:
    with pytest.raises(Unauthorized):
        grant_of(wrong, producer_key=("producer-key-0001",))


@pytest.mark.parametrize(
    "settings",
    [
        {"producer_key": ("short",)},
        {"admin_key": ("has a space in it",)},
        {"jwt_secret": "x" * 31},
        {"jwt_public_key": "/nowhere/key.pem"},
    ],
)
def test_settings_that_cannot_keep_anybody_out_stop_relay(settings: dict[str, Any]) -> None:
    with pytest.raises(StartupError):
        keyring(**settings)


# Tokens


def test_what_is_minted_grants_what_was_asked_for() -> None:
    rights = [Right.CANCEL, Right.READ]
    token = mint(SECRET, rights, ["chat-*", "x"], 60, audience="relay", issuer="me", subject="you", now=NOW)
    granted = grant_of(token, jwt_issuer="me")
    assert granted == Grant(frozenset(rights), ("chat-*", "x"), NOW + 60, "you")


def test_a_token_for_an_answers_stream_reads_and_cancels_that_stream_alone() -> None:
    granted = grant_of(keyring(jwt_secret=SECRET, token_s=90.0).token_for("chat-1"))
    assert granted == Grant(frozenset((Right.READ, Right.CANCEL)), ("chat-1",), NOW + 90)
    assert keyring(admin_key=("admin-key-00000001",)).token_for("chat-1") == ""


@pytest.mark.parametrize(
    ("secret", "streams"), [("x" * 31, ["s"]), (SECRET, ["a b"]), (SECRET, ["a/b"]), (SECRET, [""])]
)
def test_a_token_that_is_no_use_is_not_minted(secret: str, streams: list[str]) -> None:
    with pytest.raises(ValueError, match=r"secret|pattern"):
        mint(secret, [Right.READ], streams, 60, audience="relay")


@pytest.mark.parametrize(
    ("scope", "rights"),
    [
        ("read write", {"read", "write"}),
        (["cancel"], {"cancel"}),
        ("root read", {"read"}),
        (7, set()),
        (None, set()),
    ],
)
def test_scopes_are_words_and_unknown_ones_grant_nothing(scope: Any, rights: set[str]) -> None:
    assert grant_of(signed(scope=scope)).rights == rights


@pytest.mark.parametrize("streams", [None, [], 7, [7, None]])
def test_a_token_without_streams_is_for_none(streams: Any) -> None:
    assert grant_of(signed(streams=streams)).streams == ()


@pytest.mark.parametrize(
    "more",
    [
        {"exp": NOW - 6},
        {"exp": None},
        {"exp": "soon"},
        {"nbf": NOW + 6},
        {"aud": None},
        {"aud": "another"},
        {"aud": ["another", "third"]},
    ],
    ids=str,
)
def test_a_token_of_another_time_or_audience_grants_nothing(more: dict[str, Any]) -> None:
    with pytest.raises(Unauthorized):
        grant_of(signed(**more))


@pytest.mark.parametrize("more", [{"exp": NOW - 4}, {"nbf": NOW + 4}, {"aud": ["another", "relay"]}], ids=str)
def test_clocks_may_be_off_a_little_and_a_token_may_be_for_several(more: dict[str, Any]) -> None:
    assert grant_of(signed(**more)).streams == ("s",)


def test_a_token_of_another_issuer_grants_nothing() -> None:
    with pytest.raises(Unauthorized):
        grant_of(signed(iss="another"), jwt_issuer="me")
    with pytest.raises(Unauthorized):
        grant_of(signed(), jwt_issuer="me")


def test_a_token_signed_otherwise_grants_nothing(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    pem = tmp_path / "key.pem"
    pem.write_bytes(public_pem(rsa))
    head, body, signature = signed().split(".")
    unsigned = jwt.encode(claims(), None, "none")
    public_as_secret = (
        base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=") + "." + body
    )
    forged = hmac.new(public_pem(rsa), public_as_secret.encode(), hashlib.sha256).digest()
    tokens = [
        signed("another secret of thirty-two bytes"),
        unsigned,
        f"{head}.{body}.",
        f"{head}.{body}.{signature[::-1]}",
        f"{head}.{body[:-2]}xx.{signature}",
        signed(algorithm="HS512"),
        f"{public_as_secret}.{in_base64(forged)}",
        "..", "a.b.c", "\0", "é" * 20,
    ]  # fmt: skip
    for token in tokens:
        with pytest.raises(Unauthorized):
            grant_of(token, jwt_public_key=str(pem))
    with pytest.raises(Unauthorized):  # the public key is no secret, and is not taken for one
        grant_of(tokens[6], jwt_secret="", jwt_public_key=str(pem))


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_public_key_verifies_with_its_own_algorithm(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    key: Signing = request.getfixturevalue(kind)
    pem = tmp_path / "key.pem"
    pem.write_bytes(public_pem(key))
    algorithm = "RS256" if kind == "rsa" else "EdDSA"
    assert grant_of(signed(key, algorithm), jwt_secret="", jwt_public_key=str(pem)).streams == ("s",)
    if kind == "rsa":
        with pytest.raises(Unauthorized):
            grant_of(signed(key, "PS256"), jwt_secret="", jwt_public_key=str(pem))


def test_a_public_key_of_another_kind_stops_relay(tmp_path: Path) -> None:
    pem = tmp_path / "key.pem"
    pem.write_bytes(public_pem(generate_private_key(SECP256R1())))
    with pytest.raises(StartupError):
        keyring(jwt_public_key=str(pem))


def test_only_a_token_that_merely_reads_and_ends_soon_may_stand_in_a_url() -> None:
    ring = keyring(jwt_secret=SECRET)
    soon = Grant(frozenset((Right.READ,)), ("s",), NOW + 3600)
    assert ring.for_url(soon) is soon
    for grant in (
        replace(soon, rights=frozenset((Right.READ, Right.CANCEL))),
        replace(soon, rights=frozenset((Right.WRITE,))),
        replace(soon, expires_at=NOW + 3700),
        PRODUCER,
    ):
        with pytest.raises(Unauthorized):
            ring.for_url(grant)


@pytest.mark.parametrize(
    "more", [{"exp": float("nan")}, {"exp": float("inf")}, {"exp": 10**400}, {"nbf": float("nan")}]
)
def test_a_token_whose_times_are_no_times_grants_nothing(more: dict[str, Any]) -> None:
    """NaN is neither before nor after now: it would never expire."""
    with pytest.raises(Unauthorized):
        grant_of(signed(**more))


def test_a_token_is_nothing_but_three_words() -> None:
    """It may become a cookie: nothing rides along."""
    good = signed()
    assert grant_of(good).streams == ("s",)
    for more in (";;", "=; Domain=evil.example", "\r\nX: y", ",", " ", "\n", "=", ".x"):
        with pytest.raises(Unauthorized):
            grant_of(good + more)


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 6000,
        b'{"alg":"HS256","x":' + b"[" * 5900,
        b'{"alg":"HS256","x":' + b"[" * 2900 + b"]" * 2900 + b"}",
        b'{"alg":' + b"1" * 5900 + b"}",
        b'{"alg":["HS256"]}',
        b'{"alg":{"HS256":1}}',
        b'{"alg":"HS256","crit":["b64"],"b64":false}',
        b'{"alg":"hs256"}',
        b'{"alg":"HS256\\u0000"}',
        b'{"alg":"None"}',
        b'"HS256"',
        b"\xff\xfe",
    ],
    ids=lambda head: head[:24].decode("latin-1"),
)
def test_a_head_that_is_made_to_confuse_grants_nothing(head: bytes) -> None:
    body = in_base64(json.dumps(claims()).encode())
    signature = in_base64(hmac.new(SECRET.encode(), b"x", hashlib.sha256).digest())
    with pytest.raises(Unauthorized):
        grant_of(f"{in_base64(head)}.{body}.{signature}")


def test_a_token_does_not_bring_its_own_key(rsa: RSAPrivateKey, web: Web, tmp_path: Path) -> None:
    """What a head says of keys is what its writer says (RFC 8725 section 3.10)."""
    jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa.public_key()))
    web.answer = lambda request: (200, json.dumps({"keys": [jwk]}).encode())
    pem = tmp_path / "key.pem"
    pem.write_bytes(public_pem(generate_rsa_key(65537, 2048)))
    for more in (
        {"jwk": jwk}, {"jku": web.url}, {"x5u": web.url}, {"kid": web.url}, {"kid": "../../../../dev/null"},
        {"kid": "' OR 1=1 --"}, {"kid": ""},
    ):  # fmt: skip
        for key, algorithm in ((rsa, "RS256"), ("no secret of thirty-two bytes, but known", "HS256")):
            with pytest.raises(Unauthorized):
                grant_of(jwt.encode(claims(), key, algorithm, headers=more), jwt_public_key=str(pem))
    assert web.asked == []


# What others are asked


class Web:
    """A web server whose answers the test decides; `asked` are the requests."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], tuple[int, bytes]] = lambda request: (200, b"")
        self.asked: list[dict[str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append({name.lower(): value for name, value in self.headers.items()})
                status, body = web.answer(self)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Web]:
        web = cls()
        thread = threading.Thread(target=web.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield web
        finally:
            web.server.shutdown()
            web.server.server_close()
            thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web.running() as server:
        yield server


def published(**keys: Signing) -> bytes:
    """A JWKS of public keys by their ids."""
    listed = []
    for kid, key in keys.items():
        algorithm = jwt.get_algorithm_by_name("RS256" if isinstance(key, RSAPrivateKey) else "EdDSA")
        entry = json.loads(algorithm.to_jwk(key.public_key()))
        listed.append(entry | {"kid": kid, "use": "sig"})
    return json.dumps({"keys": listed}).encode()


def test_published_keys_verify_by_their_ids(
    web: Web, rsa: RSAPrivateKey, ed25519: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "JWKS_AGAIN_S", 600.0)
    web.answer = lambda request: (200, published(one=rsa, two=ed25519))

    async def scenario() -> None:
        ring = keyring(jwks_url=f"{web.url}/keys")
        for token in (
            signed(rsa, "RS256", "one"),
            signed(ed25519, "EdDSA", "two"),
            signed(ed25519, "EdDSA"),  # the only one of its kind
        ):
            assert (await ring.grant(token)).streams == ("s",)
        for wrong in (signed(rsa, "RS256", "two"), signed(rsa, "RS256", "three"), signed()):
            with pytest.raises(Unauthorized):
                await ring.grant(wrong)
        await ring.close()

    asyncio.run(scenario())
    assert len(web.asked) == 1  # and not once for each unknown id


def test_a_key_published_later_is_found(
    web: Web, rsa: RSAPrivateKey, ed25519: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "JWKS_AGAIN_S", 0.0)
    web.answer = lambda request: (200, published(one=rsa))

    async def scenario() -> None:
        ring = keyring(jwks_url=web.url)
        await ring.grant(signed(rsa, "RS256", "one"))
        web.answer = lambda request: (200, published(new=ed25519))
        assert (await ring.grant(signed(ed25519, "EdDSA", "new"))).streams == ("s",)
        with pytest.raises(Unauthorized):
            await ring.grant(signed(rsa, "RS256", "one"))  # it was taken back
        web.answer = lambda request: (500, b"")
        await ring.grant(signed(ed25519, "EdDSA", "new"))  # those that are known stay so for a while
        await ring.close()

    asyncio.run(scenario())


def test_many_published_keys_are_read_whole(web: Web, rsa: RSAPrivateKey) -> None:
    """They come in several pieces, and more than one read takes."""
    jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa.public_key()))
    keys = [jwk | {"kid": f"k{number}"} for number in range(300)]
    web.answer = lambda request: (200, json.dumps({"keys": keys}).encode())
    token = signed(rsa, "RS256", kid="k299")
    assert grant_of(token, jwt_secret="", jwks_url=web.url).streams == ("s",)
    web.answer = lambda request: (200, json.dumps({"keys": keys * 10}).encode())
    with pytest.raises(AuthUnavailable):
        grant_of(token, jwt_secret="", jwks_url=web.url)


@pytest.mark.parametrize(
    "answer", [(500, b""), (302, b""), (200, b"no json"), (200, b'{"keys": []}')], ids=str
)
def test_keys_that_cannot_be_had_are_no_refusal(
    web: Web, rsa: RSAPrivateKey, answer: tuple[int, bytes]
) -> None:
    web.answer = lambda request: answer
    with pytest.raises(AuthUnavailable):
        grant_of(signed(rsa, "RS256", "one"), jwks_url=web.url)


def question(**more: Any) -> Question:
    given = Question(
        authorization="Bearer app", cookie="session=1", method="GET", target="/relay/v1/x?y=1", host="h",
        client="192.0.2.1", right=Right.READ, stream="s",
    )  # fmt: skip
    return replace(given, **more)


def test_the_application_is_asked_with_the_requests_own_credentials(web: Web) -> None:
    async def ask() -> Grant:
        forward = ForwardAuth(Settings(auth_url=f"{web.url}/may", auth_recheck_s=100.0))
        try:
            return await forward.grant(question())
        finally:
            await forward.close()

    granted = asyncio.run(ask())
    assert (granted.rights, granted.streams, granted.renewable) == ({Right.READ}, ("s",), True)
    asked = web.asked[0]
    told = {
        "authorization": "Bearer app", "cookie": "session=1", "x-forwarded-method": "GET",
        "x-forwarded-uri": "/relay/v1/x?y=1", "x-forwarded-host": "h", "x-forwarded-for": "192.0.2.1",
        "relay-right": "read", "relay-stream": "s",
    }  # fmt: skip
    assert told.items() <= asked.items()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Unauthorized),
        (403, Forbidden),
        (404, Forbidden),
        (500, AuthUnavailable),
        (302, AuthUnavailable),
        (429, AuthUnavailable),
    ],
)
def test_what_is_not_yes_is_no(web: Web, status: int, error: type[Exception]) -> None:
    web.answer = lambda request: (status, b"")

    async def ask() -> None:
        forward = ForwardAuth(Settings(auth_url=web.url))
        try:
            with pytest.raises(error):
                await forward.grant(question())
        finally:
            await forward.close()

    asyncio.run(ask())


def test_an_application_that_is_down_is_no_refusal() -> None:
    async def ask() -> None:
        forward = ForwardAuth(Settings(auth_url="http://127.0.0.1:9"))
        with pytest.raises(AuthUnavailable):
            await forward.grant(question())
        await forward.close()

    asyncio.run(ask())


def test_answers_are_remembered_for_the_same_who_and_what_alone(web: Web) -> None:
    async def scenario() -> None:
        forward = ForwardAuth(Settings(auth_url=web.url, auth_cache_s=600.0))
        await asyncio.gather(*(forward.grant(question()) for _ in range(20)))
        await forward.grant(question(target="/other", method="POST"))
        assert len(web.asked) == 1
        others: list[dict[str, Any]] = [
            {"stream": "t"}, {"right": Right.CANCEL}, {"cookie": "session=2"}, {"authorization": ""},
            {"host": "another.example"}, {"client": "192.0.2.9"},
        ]  # fmt: skip
        for count, other in enumerate(others, 2):
            await forward.grant(question(**other))
            assert len(web.asked) == count
        await forward.close()

    asyncio.run(scenario())


def test_answers_are_not_remembered_without_a_time_for_it_nor_when_there_was_none(web: Web) -> None:
    async def scenario() -> None:
        forward = ForwardAuth(Settings(auth_url=web.url, auth_cache_s=0))
        await forward.grant(question())
        await forward.grant(question())
        assert len(web.asked) == 2
        await forward.close()
        forward = ForwardAuth(Settings(auth_url=web.url))
        web.answer = lambda request: (500, b"")
        with pytest.raises(AuthUnavailable):
            await forward.grant(question())
        web.answer = lambda request: (200, b"")
        await forward.grant(question())
        await forward.close()

    asyncio.run(scenario())


def test_every_key_is_compared_whichever_is_presented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length, in constant time, and no sooner an end for a first key than for a last one."""
    keys = [f"producer-key-number-{number}" for number in range(5)]
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr("relay.security.hmac.compare_digest", compare)
    for presented in (keys[0], keys[-1]):
        compared.clear()
        assert grant_of(presented, jwt_secret="", producer_key=tuple(keys)) == PRODUCER
        assert compared == [(32, 32)] * len(keys)
    compared.clear()
    with pytest.raises(Unauthorized):
        grant_of("x", jwt_secret="", producer_key=tuple(keys))
    assert compared == [(32, 32)] * len(keys)
