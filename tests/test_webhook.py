"""The webhook: what a receiver gets, how often, and where nothing is ever sent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from held_port import held_port
from own_journal import own_journal
from scripted_upstream import Exchange, Received, ScriptedUpstream
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from relay.errors import JournalUnavailable, StartupError
from relay.frame import Event
from relay.journal.base import Append, Delivery, Journal, RunInfo, RunOpening
from relay.lifecycle import Reason, ending
from relay.limits import Retention
from relay.settings import Settings
from relay.webhook import CONCURRENT_MAX, PublicResolver, Webhook, delay_after, is_public

DEADLINE_S = 60
SECRET = "whsec_" + base64.b64encode(b"s" * 24).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"o" * 64).decode()

Play = Callable[["Scene"], Any]
Answer = Callable[[Exchange], Any]


class Receiver:
    """Whoever is posted to. It answers each call as `answers` say, the last one from then on."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.path = "/" + secrets.token_hex(8)
        self.url = upstream.url + self.path
        self.got: asyncio.Queue[Received] = asyncio.Queue()
        self.answers: list[Answer] = [status("200 OK")]
        loop = asyncio.get_running_loop()

        async def handler(exchange: Exchange) -> None:
            loop.call_soon_threadsafe(self.got.put_nowait, exchange.received)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            await answer(exchange)

        upstream.on(self.path, handler)


def status(line: str, *headers: str) -> Answer:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(line, b"{}", "application/json", *headers)

    return answer


async def silence(exchange: Exchange) -> None:
    await exchange.closed()


async def break_off(exchange: Exchange) -> None:
    exchange.writer.close()


async def no_http(exchange: Exchange) -> None:
    await exchange.send(b"220 mail.example ESMTP\r\n\r\n")
    exchange.writer.close()


class Noting:
    """A real journal that notes what comes of deliveries, makes every pause none, and does at a claim what
    the test wants."""

    def __init__(self, real: Journal) -> None:
        self.real = real
        self.outcomes: asyncio.Queue[tuple[str, str | float]] = asyncio.Queue()
        """Run, and `settled` or the pause in seconds."""
        self.settled = 0
        self.lease_s: float | None = None
        self.failures: list[Exception] = []
        """Raised by the next looks at a run, one each; with the last one `lease_s` is over too."""
        self.claiming: Callable[[Sequence[Delivery]], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def claim_deliveries(self, limit: int, lease_s: float) -> Sequence[Delivery]:
        claimed = await self.real.claim_deliveries(limit, self.lease_s or lease_s)
        if self.claiming is not None:
            claimed = await self.claiming(claimed)
        return claimed

    async def run(self, stream: str, run: str) -> RunInfo:
        if self.failures:
            failure = self.failures.pop(0)
            if not self.failures:
                self.lease_s = None
            raise failure
        return await self.real.run(stream, run)

    async def settle_delivery(self, stream: str, run: str) -> None:
        await self.real.settle_delivery(stream, run)
        self.settled += 1
        self.outcomes.put_nowait((run, "settled"))

    async def postpone_delivery(self, stream: str, run: str, delay_s: float) -> None:
        await self.real.postpone_delivery(stream, run, 0)
        self.outcomes.put_nowait((run, delay_s))


class Scene:
    """A journal, a receiver, and webhooks between them."""

    def __init__(self, journal: Journal, upstream: ScriptedUpstream) -> None:
        self.journal = Noting(journal)
        self.receiver = Receiver(upstream)

    async def end_run(self, run: str = "run-1", stream: str = "s", *words: str) -> None:
        opening = RunOpening(stream, run, "w", f"token-{stream}-{run}", Retention(), deliver=True)
        await self.journal.open_run(opening)
        events = [Event("", word.encode()) for word in words or ("hel", "lo")]
        text_bytes = sum(len(event.data) for event in events)
        end = ending(Reason.PRODUCER_END)
        await self.journal.append(Append(stream, run, "w", 1, events, text_bytes, ending=end))

    @contextlib.asynccontextmanager
    async def delivering(
        self, poll_s: float = 0.05, jitter: float = 0.5, **settings: Any
    ) -> AsyncIterator[Webhook]:
        given = {"webhook_url": self.receiver.url, "webhook_secret": SECRET, "webhook_allow_private": True}
        journal: Any = self.journal
        webhook = Webhook(journal, Settings(**(given | settings)), jitter=lambda: jitter, poll_s=poll_s)
        task = asyncio.create_task(webhook.run())
        try:
            yield webhook
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def outcomes(self, count: int) -> list[str | float]:
        return [(await self.journal.outcomes.get())[1] for _ in range(count)]

    async def nothing_is_left(self) -> bool:
        return not await self.journal.real.claim_deliveries(100, 0)


@pytest.fixture
def perform(
    fresh_journal: Callable[[], str], name: str, upstream: ScriptedUpstream
) -> Callable[[Play], None]:
    """Plays a scene on a journal of each kind."""

    async def opened(play: Play) -> None:
        async with asyncio.timeout(DEADLINE_S), own_journal(fresh_journal(), name) as journal:
            await play(Scene(journal, upstream))

    return lambda play: asyncio.run(opened(play))


Perform = Callable[[Play], None]


def verified(received: Received, secret: str = SECRET) -> Any:
    """The payload, if a library of others takes it for genuine."""
    return Verifier(secret).verify(received.body, dict(received.headers))


# What a receiver gets


def test_the_end_of_a_run_is_posted_with_its_transcript_signed_and_named_by_the_run(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        async with scene.delivering():
            received = await scene.receiver.got.get()
            assert await scene.outcomes(1) == ["settled"]
        payload = verified(received)
        info = await scene.journal.run("s", "run-1")
        assert received.method == "POST"
        assert received.header("webhook-id") == "run-1"
        assert received.header("content-type") == "application/json"
        assert payload["type"] == "run.ended"
        assert payload["timestamp"] == payload["data"]["ended"]
        assert payload["data"]["stream"] == "s"
        assert payload["data"]["run"] == "run-1"
        assert payload["data"]["status"] == "completed"
        assert payload["data"]["text"] == "hello"
        assert payload["data"]["parts"] == [{"kind": "text", "index": 0, "text": "hello"}]
        assert payload["data"]["last"] == str(info.last)
        assert await scene.nothing_is_left()

    perform(play)


def test_a_changed_body_or_a_foreign_secret_does_not_verify(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        async with scene.delivering():
            received = await scene.receiver.got.get()
        with pytest.raises(WebhookVerificationError):
            verified(received, OTHER_SECRET)
        received.body = received.body.replace(b"hello", b"hullo")
        with pytest.raises(WebhookVerificationError):
            verified(received)

    perform(play)


def test_while_the_secret_is_changed_both_verify(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        async with scene.delivering(webhook_secret=f"{SECRET} {OTHER_SECRET}"):
            received = await scene.receiver.got.get()
        assert verified(received, SECRET) == verified(received, OTHER_SECRET)

    perform(play)


def test_a_text_too_large_is_posted_cut(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run("run-1", "s", *["x" * 1000] * 3000)
        async with scene.delivering(transcript_max_bytes=2_000_000):
            data = verified(await scene.receiver.got.get())["data"]
        assert (len(data["text"]), data["truncated"], data["frames"]) == (2_000_000, True, 3000)

    perform(play)


# How often


def test_a_delivery_that_fails_is_tried_again_after_growing_pauses(
    perform: Perform, upstream: ScriptedUpstream
) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        elsewhere = Receiver(upstream)
        scene.receiver.answers = [
            status("500 Internal Server Error"),
            status("302 Found", f"Location: {elsewhere.path}"),
            status("307 Temporary Redirect", f"Location: {elsewhere.path}"),
            break_off,
            no_http,
            status("429 Too Many Requests"),
            status("202 Accepted"),
        ]
        async with scene.delivering():
            assert await scene.outcomes(7) == [5, 30, 120, 600, 3600, 3600, "settled"]
        tries = [scene.receiver.got.get_nowait() for _ in range(scene.receiver.got.qsize())]
        assert {received.header("webhook-id") for received in tries} == {"run-1"}
        assert len({received.body for received in tries}) == 1
        assert len(tries) == 7
        assert elsewhere.got.empty(), "no redirect is followed"
        assert await scene.nothing_is_left()

    perform(play)


def test_a_receiver_that_does_not_answer_in_time_is_tried_again(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [silence]
        async with scene.delivering(poll_s=3600, webhook_timeout_s=0.2):
            assert await scene.outcomes(1) == [5]
        # A receiver that answers may take its time, which a busy machine may need.
        scene.receiver.answers = [status("200 OK")]
        async with scene.delivering():
            assert await scene.outcomes(1) == ["settled"]

    perform(play)


def test_a_receiver_that_cannot_be_reached_is_tried_again(
    perform: Perform, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        with held_port() as port:
            async with scene.delivering(webhook_url=f"http://127.0.0.1:{port}/"):
                assert await scene.outcomes(2) == [5, 30]

    caplog.set_level(logging.WARNING, "relay.webhook")
    perform(play)
    assert "not delivered stream=s run=run-1 tries=1 again_s=5: cannot connect" in caplog.text


def test_an_answer_without_end_is_not_read_to_its_end(perform: Perform) -> None:
    cut = asyncio.Event()

    async def endless(exchange: Exchange) -> None:
        await exchange.head()
        with contextlib.suppress(ConnectionError):
            while True:
                await exchange.chunk(b"x" * 10_000)
        cut.set()

    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [endless]
        async with scene.delivering(webhook_timeout_s=3600):
            assert await scene.outcomes(1) == ["settled"]
            while not cut.is_set():  # noqa: ASYNC110  # it is set in another thread
                await asyncio.sleep(0.01)

    perform(play)


def test_it_is_given_up_in_the_end_and_said_so(perform: Perform, caplog: pytest.LogCaptureFixture) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [status("500 Internal Server Error")]
        async with scene.delivering(webhook_give_up_s=40):
            assert await scene.outcomes(3) == [5, 30, "settled"]
        assert await scene.nothing_is_left()

    caplog.set_level(logging.ERROR, "relay.webhook")
    perform(play)
    (record,) = caplog.records
    assert record.getMessage() == (
        "never delivered, given up stream=s run=run-1 tries=3: the receiver answered 500"
    )


def test_pauses_grow_to_an_hour_and_end_when_it_is_given_up() -> None:
    three_days_s = 3 * 24 * 3600
    delays: list[float] = []
    while (delay := delay_after(len(delays), three_days_s)) is not None:
        delays.append(delay)
    assert delays[:7] == [5, 30, 120, 600, 3600, 3600, 3600]
    assert set(delays[7:]) == {3600}
    assert three_days_s - 3600 < sum(delays) <= three_days_s


@pytest.mark.parametrize(("jitter", "delay_s"), [(0.0, 4.0), (1.0, 6.0)])
def test_a_pause_is_jittered(perform: Perform, jitter: float, delay_s: float) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [status("500 Internal Server Error")]
        async with scene.delivering(jitter=jitter):
            assert await scene.outcomes(1) == [delay_s]

    perform(play)


def test_a_receiver_that_is_gone_gets_a_run_no_more(
    perform: Perform, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [status("410 Gone")]
        async with scene.delivering():
            assert await scene.outcomes(1) == ["settled"]
        assert await scene.nothing_is_left()

    caplog.set_level(logging.WARNING, "relay.webhook")
    perform(play)
    assert "410" in caplog.text


def test_what_a_process_claimed_and_did_not_settle_is_delivered_by_the_next(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        (claimed,) = await scene.journal.real.claim_deliveries(10, 0.3)
        assert claimed == Delivery("s", "run-1", 0)
        async with scene.delivering():
            assert verified(await scene.receiver.got.get())["data"]["text"] == "hello"
            assert await scene.outcomes(1) == ["settled"]

    perform(play)


def test_two_workers_deliver_each_run_once(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        for number in range(30):
            await scene.end_run(f"run-{number}")
        async with scene.delivering(), scene.delivering():
            assert await scene.outcomes(30) == ["settled"] * 30
        assert scene.receiver.got.qsize() == 30

    perform(play)


def test_a_run_that_ends_here_is_delivered_without_waiting_for_the_next_look(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        async with scene.delivering(poll_s=3600) as webhook:
            for number in range(3):
                await scene.end_run(f"run-{number}")
                webhook.wake()
                assert await scene.outcomes(1) == ["settled"]

    perform(play)


def test_only_so_many_are_under_way_at_once_and_the_others_follow(
    perform: Perform, upstream: ScriptedUpstream
) -> None:
    gate = upstream.gate()
    under_way, most = 0, 0

    async def held(exchange: Exchange) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        under_way -= 1
        await status("200 OK")(exchange)

    async def play(scene: Scene) -> None:
        claims, most_claimed = 0, 0

        async def count(claimed: Sequence[Delivery]) -> Sequence[Delivery]:
            nonlocal claims, most_claimed
            claims += len(claimed)
            most_claimed = max(most_claimed, claims - scene.journal.settled)
            return claimed

        for number in range(3 * CONCURRENT_MAX):
            await scene.end_run(f"run-{number}")
        scene.receiver.answers = [held]
        scene.journal.claiming = count
        async with scene.delivering(poll_s=3600):
            for _ in range(CONCURRENT_MAX):
                await scene.receiver.got.get()
            for _ in range(2 * CONCURRENT_MAX):
                gate.pass_one()
                await scene.receiver.got.get()
            gate.open()
            await scene.outcomes(3 * CONCURRENT_MAX)
        assert most == most_claimed == CONCURRENT_MAX

    perform(play)


# What may go wrong here


def test_a_run_that_was_removed_is_not_delivered(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        async def then_deleted(claimed: Sequence[Delivery]) -> Sequence[Delivery]:
            await scene.journal.delete("s")
            return claimed

        await scene.end_run()
        scene.journal.claiming = then_deleted
        async with scene.delivering():
            assert await scene.outcomes(1) == ["settled"]
        assert scene.receiver.got.empty()

    perform(play)


def test_a_run_that_a_rewound_journal_holds_for_open_waits(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        async def too_early(claimed: Sequence[Delivery]) -> Sequence[Delivery]:
            return [Delivery("s", "open", 0)]

        opening = RunOpening("s", "open", "w", "token", Retention(), deliver=True)
        await scene.journal.open_run(opening)
        scene.journal.claiming = too_early
        async with scene.delivering():
            assert await scene.outcomes(1) == [5]
        assert scene.receiver.got.empty()

    perform(play)


def test_a_journal_that_is_away_delays_a_delivery_and_counts_as_no_try(perform: Perform) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.journal.lease_s = 0.001  # the claims of what fails lapse at once
        scene.journal.failures = [JournalUnavailable("away"), JournalUnavailable("away")]
        scene.receiver.answers = [status("500 Internal Server Error"), status("200 OK")]
        async with scene.delivering():
            assert await scene.outcomes(2) == [5, "settled"]

    perform(play)


def test_a_failing_claim_ends_nothing(perform: Perform, caplog: pytest.LogCaptureFixture) -> None:
    failures = [JournalUnavailable("away"), JournalUnavailable("away"), ZeroDivisionError()]

    async def play(scene: Scene) -> None:
        async def fail(claimed: Sequence[Delivery]) -> Sequence[Delivery]:
            if failures:
                raise failures.pop(0)
            return claimed

        await scene.end_run()
        scene.journal.lease_s = 0.05
        scene.journal.claiming = fail
        async with scene.delivering():
            assert await scene.outcomes(1) == ["settled"]

    caplog.set_level(logging.WARNING, "relay.webhook")
    perform(play)
    assert caplog.text.count("the journal is away, and deliveries wait") == 1
    assert "no delivery can be claimed" in caplog.text


def test_a_mistake_with_one_run_is_logged_and_it_is_tried_again(
    perform: Perform, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.journal.failures = [ZeroDivisionError()]
        async with scene.delivering():
            assert await scene.outcomes(2) == [5, "settled"]

    caplog.set_level(logging.ERROR, "relay.webhook")
    perform(play)
    assert "ZeroDivisionError" in caplog.text


def test_at_shutdown_what_is_under_way_may_finish(
    perform: Perform, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.webhook.CLOSE_S", DEADLINE_S)
    gate = upstream.gate()

    async def held(exchange: Exchange) -> None:
        await gate.wait()
        await status("200 OK")(exchange)

    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [held]
        async with scene.delivering():
            await scene.receiver.got.get()
            asyncio.get_running_loop().call_later(0.05, gate.open)
        assert await scene.outcomes(1) == ["settled"]

    perform(play)


def test_no_secret_comes_into_the_log(perform: Perform, caplog: pytest.LogCaptureFixture) -> None:
    paths = []

    async def play(scene: Scene) -> None:
        await scene.end_run()
        scene.receiver.answers = [
            status("500 Internal Server Error"),
            no_http,
            break_off,
            silence,
            status("302 Found", "Location: http://[bad"),
            status("410 Gone"),
        ]
        paths.append(scene.receiver.path)
        url = scene.receiver.url.replace("http://", "http://user:password@")
        async with scene.delivering(webhook_url=url, webhook_timeout_s=0.2):
            await scene.outcomes(6)

    caplog.set_level(logging.DEBUG)
    perform(play)
    assert len(caplog.records) >= 6
    for secret in (SECRET, SECRET.removeprefix("whsec_"), "password", "token-", *paths):
        assert secret not in caplog.text


# Where nothing is sent


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.2.3",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fec0::1",
        "fc00::1", "fd12:3456::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001:db8::1",
        "2001:0:7f00:1::", "100::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(address)


class Answers:
    """A resolver that answers as it is told, and differently each time."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.left = list(answers)

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> Any:
        return [{"hostname": host, "host": address, "port": port} for address in self.left.pop(0)]

    async def close(self) -> None:
        pass


def test_every_answer_of_dns_is_judged_and_only_public_addresses_are_left() -> None:
    inner: Any = Answers(["8.8.8.8", "10.0.0.1", "::1"], ["127.0.0.1"], [])

    async def scene() -> None:
        resolver = PublicResolver(inner)
        (found,) = await resolver.resolve("hook.example", 443)
        assert found["host"] == "8.8.8.8"
        for _ in range(2):
            with pytest.raises(OSError, match=r"hook\.example has no public address"):
                await resolver.resolve("hook.example", 443)

    asyncio.run(scene())


def test_a_name_that_resolves_to_a_private_address_is_never_connected_to(
    perform: Perform, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(scene: Scene) -> None:
        port = upstream.url.rpartition(":")[2]
        await scene.end_run()
        # The system's resolver takes this for 127.0.0.1, as it would take a name of somebody's DNS.
        url = f"http://0x7f.1:{port}{scene.receiver.path}"
        async with scene.delivering(poll_s=3600, webhook_url=url, webhook_allow_private=False):
            assert await scene.outcomes(1) == [5]
        assert scene.receiver.got.empty()
        async with scene.delivering(webhook_url=url):
            assert await scene.outcomes(1) == ["settled"]
        assert scene.receiver.got.qsize() == 1, "it would have got there"

    caplog.set_level(logging.WARNING, "relay.webhook")
    perform(play)
    assert "0x7f.1 has no public address. --webhook-allow-private" in caplog.text


def made(**settings: Any) -> Webhook:
    journal: Any = None
    given = {"webhook_url": "https://hook.example/relay", "webhook_secret": SECRET}
    return Webhook(journal, Settings(**(given | settings)))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1.", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254", "2130706433", "127.1",
        "localhost", "LOCALHOST.", "relay.localhost", "[fe80::1%25eth0]", "user:pw@10.0.0.1:80",
    ],
)  # fmt: skip
def test_a_private_address_in_the_url_is_refused_at_start_up(host: str) -> None:
    with pytest.raises(StartupError, match="--webhook-allow-private"):
        made(webhook_url=f"http://{host}/hook")


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost", "[::1]:9000", "10.0.0.1"])
def test_a_private_address_in_the_url_can_be_allowed(host: str) -> None:
    made(webhook_url=f"http://{host}/hook", webhook_allow_private=True)


@pytest.mark.parametrize(
    "url", ["https://hook.example/x?y=z", "http://8.8.8.8/", "https://user:pw@h.example"]
)
def test_a_public_url_is_taken(url: str) -> None:
    made(webhook_url=url)


@pytest.mark.parametrize(
    "url",
    ["hook.example", "ftp://hook.example/", "file:///etc/passwd", "http://", "http:///x", "https://x:99999/",
     "http://a b/", "http://[::1", "unix:///run/x"],
)  # fmt: skip
def test_what_is_no_url_of_the_web_is_refused(url: str) -> None:
    with pytest.raises(StartupError, match=r"^--webhook-url is not an http:// or https:// URL\.$"):
        made(webhook_url=url)


@pytest.mark.parametrize(
    "secret",
    ["hunter2", SECRET.removeprefix("whsec_"), "whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 120,
     "whsec_!!" + "A" * 40, f"{SECRET} hunter2"],
)  # fmt: skip
def test_a_secret_that_is_none_is_refused_with_advice_and_not_repeated(secret: str) -> None:
    with pytest.raises(StartupError, match=r"^--webhook-secret .*openssl rand") as refused:
        made(webhook_secret=secret)
    told = str(refused.value)
    assert SECRET not in told
    assert secret == "whsec_" or secret not in told


def test_a_webhook_without_a_secret_is_refused_with_advice_how_to_make_one() -> None:
    with pytest.raises(StartupError, match=r"--webhook-secret.*openssl rand"):
        made(webhook_secret="")


def test_a_secret_may_lack_its_padding() -> None:
    made(webhook_secret="whsec_" + base64.b64encode(b"s" * 25).decode().rstrip("="))


# How long deliveries wait


def test_the_delivery_that_waits_longest_is_told(fresh_journal: Callable[[], str], name: str) -> None:
    """However late its next try is."""

    async def scene() -> None:
        async with own_journal(fresh_journal(), name) as journal:
            assert (await journal.condition()).waiting_since_ms == 0
            ended = []
            for run in ("r1", "r2"):
                opening = RunOpening("s", run, "w", f"token-{run}", Retention(), deliver=True)
                await journal.open_run(opening)
                await journal.end_run("s", run, ending(Reason.CLIENT_CANCEL), {})
                ended.append((await journal.run("s", run)).ended_ms)
                await journal.file_ending("s", run)
            assert (await journal.condition()).waiting_since_ms == ended[0]
            for delivery in await journal.claim_deliveries(10, 60):
                await journal.postpone_delivery(delivery.stream, delivery.run, 3600)
            assert (await journal.condition()).waiting_since_ms == ended[0]
            await journal.settle_delivery("s", "r1")
            assert (await journal.condition()).waiting_since_ms == ended[1]
            await journal.settle_delivery("s", "r2")
            assert (await journal.condition()).waiting_since_ms == 0

    asyncio.run(scene())
