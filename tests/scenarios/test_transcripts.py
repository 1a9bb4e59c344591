"""Text that was delivered and is missing from the saved session: however a run ends, its transcript is what a
reader got of it, is handed over under the run's name, and why it ended is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from producing import LongBody, Producer
from reading import Block, Reading
from relay_process import RelayProcess
from scenarios.acting import DONE, cancel, chunk_of, events_of, rest_of, text_of, transcript
from scenarios.conftest import DEADLINE_S, LEASED, Receiver
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from relay.lifecycle import STATUS_OF, Reason

NOT_PRODUCED = {
    Reason.UPSTREAM_CANCELLED: "no dialect that relay knows has a way to say it",
    Reason.STREAM_DELETED: "the transcript goes with the stream",
}
LEFT = (Reason.OWNER_LOST, Reason.SHUTDOWN, Reason.IDLE_TIMEOUT)
TEXT = ["one", " two", " three"]


@dataclass
class Scene:
    """Where a run is to be ended. `start` makes further relays; `away` makes one whose journal goes away and
    comes back as the two calls say."""

    relay: RelayProcess
    upstream: ScriptedUpstream
    name: str
    start: Callable[..., RelayProcess]
    fresh_journal: Callable[[], str]
    away: Callable[[], tuple[RelayProcess, Callable[[], None], Callable[[], None]]]


@dataclass
class Told:
    """What a reader got of a run until it was cut or the run was over, and a relay that can be asked."""

    relay: RelayProcess
    run: str
    dialect: str
    shown: Sequence[Block]


Play = Callable[[Scene], Told]
Act = Callable[[Scene, Reading], object]


def nothing(scene: Scene, page: Reading) -> None:
    pass


def said(dialect: str, text: str) -> bytes:
    return chunk_of(text) if dialect == "openai-chat" else f"data: {text}\n\n".encode()


def proxied(dialect: str, then: Sequence[bytes] = (), *, whole: bool = True, act: Act = nothing) -> Play:
    """An agent's answer: the text, what follows it, its end if it is whole. `act` is done when the text is
    shown."""

    def play(scene: Scene) -> Told:
        gate = scene.upstream.gate()

        async def handler(exchange: Exchange) -> None:
            await exchange.head()
            for text in TEXT:
                await exchange.chunk(said(dialect, text))
            await gate.wait()
            for piece in then:
                await exchange.chunk(piece)
            await (exchange.end() if whole else exchange.closed())

        path = f"/{scene.name}" + ("/chat/completions" if dialect == "openai-chat" else "")
        scene.upstream.on(path, handler)
        with Reading(scene.relay.url + path, Relay_Stream=scene.name) as page:
            shown = page.take(len(TEXT))
            act(scene, page)
            gate.open()
            return Told(scene.relay, page.headers["relay-run"], dialect, shown + rest_of(page))

    return play


async def go_on(exchange: Exchange) -> None:
    """Say the text, and then go on and on without a word."""
    await exchange.head()
    await exchange.chunk(b"".join(said("raw", text) for text in TEXT))
    while True:
        await exchange.chunk(b": still here\n\n")
        await asyncio.sleep(0.1)


def endless(scene: Scene) -> Told:
    """An agent that never ends, and somebody who reads on."""
    scene.upstream.on(f"/{scene.name}", go_on)
    relay = scene.start(journal=scene.fresh_journal(), max_run_s=1)
    with Reading(f"{relay.url}/{scene.name}", Relay_Stream=scene.name) as page:
        return Told(relay, page.headers["relay-run"], "raw", rest_of(page))


def fallen_silent(scene: Scene) -> Told:
    """An agent that has said the text, at once, and says nothing more."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"".join(said("openai-chat", text) for text in TEXT))
        await exchange.closed()

    path = f"/{scene.name}/chat/completions"
    scene.upstream.on(path, handler)
    relay = scene.start(journal=scene.fresh_journal(), upstream_idle_s=1)
    with Reading(relay.url + path, Relay_Stream=scene.name) as page:
        return Told(relay, page.headers["relay-run"], "openai-chat", rest_of(page))


def abandoned(scene: Scene) -> Told:
    """The same, and nobody reads on."""
    scene.upstream.on(f"/{scene.name}", go_on)
    with Reading(f"{scene.relay.url}/{scene.name}", Relay_Stream=scene.name) as page:
        return Told(scene.relay, page.headers["relay-run"], "raw", page.take(len(TEXT)))


def pushed(act: Callable[[Producer], object]) -> Play:
    """A producer's run: the text, and what `act` does then."""

    def play(scene: Scene) -> Told:
        producer = Producer(scene.relay, scene.name)
        with events_of(scene.relay, scene.name, f"run={producer.run}") as tab:
            producer.push(*TEXT)
            act(producer)
            return Told(scene.relay, producer.run, "raw", rest_of(tab))

    return play


def in_one_request(then: Callable[[LongBody], object], idle_timeout_s: float = 0) -> Play:
    """A run in one body, that goes on with `then`. With an idle timeout it has a name, by which another
    request might go on with it."""

    def play(scene: Scene) -> Told:
        target = f"/relay/v1/streams/{scene.name}/runs?end=completed"
        if idle_timeout_s:
            target += f"&run={scene.name}&idle_timeout_s={idle_timeout_s}"
        body = LongBody(scene.relay.port, target, "application/x-ndjson")
        try:
            # In one piece: a run that may be silent only so long has all of it, or nothing.
            body.send(b"".join(json.dumps({"data": text}).encode() + b"\n" for text in TEXT))
            with events_of(scene.relay, scene.name) as tab:
                shown = tab.take(len(TEXT) + 3)  # hello, live and run.started
            then(body)
            run = scene.relay.json(f"/relay/v1/streams/{scene.name}")["latest_run"]
            with events_of(scene.relay, scene.name, f"run={run}", Last_Event_ID=shown[-1].id) as rest:
                return Told(scene.relay, run, "raw", shown + rest_of(rest))
        finally:
            with contextlib.suppress(OSError):  # it may be closed already
                body.cut()

    return play


def ends(**body: str) -> Callable[[Producer], object]:
    return lambda producer: producer.ask("end", body)


def by_process(end: Callable[[RelayProcess], None], **settings: Any) -> Play:
    """The process of an answer ends, and another one is asked."""

    def play(scene: Scene) -> Told:
        url = scene.fresh_journal()
        owner = scene.start(journal=url, **settings)
        answer = proxied("openai-chat", whole=False, act=lambda scene, page: end(owner))
        told = answer(replace(scene, relay=owner))
        asked = scene.relay if url.startswith("redis") else scene.start(journal=url)
        return replace(told, relay=asked)

    return play


def without_journal(scene: Scene) -> Told:
    """The journal is away for longer than the run waits for it. The client comes back when it is back."""
    owner, goes, comes = scene.away()
    answer = proxied("openai-chat", [chunk_of(" four")], whole=False, act=lambda scene, page: goes())
    told = answer(replace(scene, relay=owner))
    comes()
    return told


ENDINGS: list[tuple[Reason, str, Play]] = [
    (Reason.UPSTREAM_END, "openai", proxied("openai-chat", [DONE])),
    (Reason.UPSTREAM_END, "raw", proxied("raw")),
    (Reason.PRODUCER_END, "pushed", pushed(lambda producer: producer.push(" four", end="completed"))),
    (Reason.PRODUCER_END, "in one request", in_one_request(LongBody.finish)),
    (Reason.INPUT_REQUIRED, "pushed", pushed(ends(status="completed", reason="input_required"))),
    (Reason.UPSTREAM_TRUNCATED, "openai", proxied("openai-chat")),
    (Reason.UPSTREAM_TRUNCATED, "in one request", in_one_request(LongBody.cut)),
    (Reason.UPSTREAM_ERROR, "openai", proxied("openai-chat", [b'data: {"error": {"message": "no"}}\n\n'])),
    (Reason.UPSTREAM_TIMEOUT, "openai", fallen_silent),
    (Reason.PRODUCER_FAILED, "pushed", pushed(ends(status="failed", error="no"))),
    (Reason.FRAME_TOO_LARGE, "openai", proxied("openai-chat", [chunk_of("x" * 2000)])),
    (Reason.FRAME_TOO_LARGE, "in one request", in_one_request(lambda body: body.lines("x" * 2001))),
    (Reason.INVALID_FRAME, "raw", proxied("raw", [b"event: relay\ndata: x\n\n"])),
    (Reason.INVALID_FRAME, "in one request", in_one_request(lambda body: body.send(b"not JSON\n"))),
    (
        Reason.CLIENT_CANCEL,
        "openai",
        proxied("openai-chat", whole=False, act=lambda scene, page: cancel(scene.relay, scene.name)),
    ),
    (
        Reason.SUPERSEDED,
        "openai",
        proxied(
            "openai-chat",
            whole=False,
            act=lambda scene, page: Producer(scene.relay, scene.name, supersedes="latest").push("new"),
        ),
    ),
    (Reason.ABANDONED, "raw", abandoned),
    (Reason.MAX_RUN, "raw", endless),
    (Reason.OWNER_LOST, "openai", by_process(RelayProcess.kill)),
    (Reason.IDLE_TIMEOUT, "in one request", in_one_request(LongBody.cut, idle_timeout_s=0.3)),
    (Reason.JOURNAL_LOST, "openai", without_journal),
    (Reason.SHUTDOWN, "openai", by_process(RelayProcess.stop, drain_grace_s=0.1)),
]


@pytest.fixture
def scene(
    hurried: RelayProcess,
    fresh_journal: Callable[[], str],
    upstream: ScriptedUpstream,
    receiver: Receiver,
    name: str,
) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> RelayProcess:
            given: dict[str, Any] = {"upstream": upstream.url} | LEASED | receiver.settings | settings
            return stack.enter_context(RelayProcess.start(**given))

        def away() -> tuple[RelayProcess, Callable[[], None], Callable[[], None]]:
            url = fresh_journal()
            short = {"journal_timeout_s": 1.5, "journal_deadline_s": 1, "owner_lease_s": 60}
            if url.startswith("sqlite"):
                relay = start(journal=url, **short)
                unlimited = resource.prlimit(relay.pid, resource.RLIMIT_FSIZE)

                def limit(most: int) -> None:
                    resource.prlimit(relay.pid, resource.RLIMIT_FSIZE, (most, unlimited[1]))

                return relay, lambda: limit(0), lambda: limit(unlimited[0])
            port = int(url.rpartition(":")[2].partition("/")[0])
            proxy = stack.enter_context(TcpProxy.running(port))
            relay = start(journal=f"redis://127.0.0.1:{proxy.port}/0", **short)

            def goes() -> None:
                proxy.refusing = True
                proxy.cut_all()

            def comes() -> None:
                proxy.refusing = False

            return relay, goes, comes

        yield Scene(hurried, upstream, name, start, fresh_journal, away)


def test_every_way_to_end_is_tried_or_said_to_be_none() -> None:
    assert {reason for reason, *_ in ENDINGS} | NOT_PRODUCED.keys() == set(Reason)


@pytest.mark.parametrize(
    ("reason", "play"),
    [pytest.param(reason, play, id=f"{reason}-{how}") for reason, how, play in ENDINGS],
)
def test_text_delivered_to_the_user_but_missing_from_the_saved_session(
    scene: Scene, receiver: Receiver, journal_url: str, reason: Reason, play: Play
) -> None:
    told = play(scene)
    handed_over = receiver.handed_over(told.run)
    kept = transcript(told.relay, scene.name, told.run)
    assert handed_over == kept
    assert (kept["status"], kept["reason"]) == (STATUS_OF[reason], reason)
    last_id = told.shown[-1].id
    with events_of(told.relay, scene.name, f"run={told.run}&control=none", Last_Event_ID=last_id) as rest:
        shown = [*told.shown, *rest_of(rest)]
    assert kept["text"] == text_of(told.dialect, shown)
    assert kept["text"].startswith("".join(TEXT))
    assert kept["truncated"] is False
    assert len({block.id for block in shown if block.event != "relay"}) == kept["frames"] + (
        sum('"error"' in block.data and '"relay_' in block.data for block in shown)
    )
    # The process that ended it tells why. Of several on one Redis, anyone may find what was left.
    if reason not in (LEFT if journal_url.startswith("redis") else LEFT[:2]):
        ended = told.relay.json("/relay/v1/diagnostics")["ended_runs"]
        (entry,) = [entry for entry in ended if entry["run"] == told.run]
        assert (entry["stream"], entry["status"], entry["reason"]) == (scene.name, STATUS_OF[reason], reason)
        assert entry["error"] == kept["error"]


def test_p3_a_transcript_is_handed_over_though_the_first_tries_fail_and_relay_is_killed_before_the_next(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, receiver: Receiver, name: str
) -> None:
    """Between the ending and its delivery the process dies; the next one on that journal delivers."""
    tried = threading.Event()

    async def refuse(exchange: Exchange) -> None:
        tried.set()
        await exchange.answer("500 Internal Server Error", b"")

    upstream.on(f"/{name}-receiver", refuse)
    # Apart from other relays on one Redis: whoever of them looks next would take the delivery.
    own: dict[str, Any] = {"journal": fresh_journal(), "redis_prefix": name}
    refused = receiver.settings | {"webhook_url": f"{upstream.url}/{name}-receiver"}
    with RelayProcess.start(**own, **refused) as relay:
        producer = Producer(relay, name)
        producer.push("what was said", end="completed")
        assert tried.wait(DEADLINE_S)
        relay.logged_line(f"run={producer.run} tries=1 again_s")
        Producer(relay, name)  # written behind the note that the try failed
        relay.kill()
    with RelayProcess.start(**own, **receiver.settings) as relay:
        handed_over = receiver.handed_over(producer.run)
        assert handed_over == transcript(relay, name, producer.run)
    assert handed_over["text"] == "what was said"
