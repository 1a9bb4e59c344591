"""relay.replay.response: a reader's bytes as an HTTP response, whole or visibly broken off."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from replay.doubtful_journal import Stage, staged

from relay.cursor import ORIGIN
from relay.errors import Busy, UnknownStream
from relay.replay.pages import SharedPage
from relay.replay.reader import Reader, ReaderEnd, Readers
from relay.replay.response import (
    CONNECTION,
    StreamAnswer,
    send_no_content,
    send_problem,
    serve_reader,
    takes_gzip,
)
from relay.replay.view import EventsView, View


class Connection:
    """What the server gives a response, and what the response did with it."""

    def __init__(self) -> None:
        self.on_lost: Callable[[], None] | None = None
        self.broken = False
        self.messages: list[dict[str, Any]] = []
        self.live = asyncio.Event()

    def abort(self) -> None:
        self.broken = True

    def finish_and_abort(self) -> None:
        self.broken = True

    def begin_stream(self) -> None:
        self.begun = not self.messages

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    writable = True

    async def until_writable(self) -> None:
        raise AssertionError("it is writable")

    def write(self, data: bytes) -> bool:
        self.messages.append({"body": data, "more_body": True})
        if b'"live"' in data:
            self.live.set()
        return True

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def whole(self) -> bool:
        return self.messages[-1].get("more_body") is False


async def serve(
    stage: Stage,
    connection: Connection,
    view: View,
    *,
    whole: Callable[[Reader], Awaitable[bool]] | None = None,
    before: Callable[[Reader], None] = lambda reader: None,
    gzip: bool = False,
) -> ReaderEnd:
    page = SharedPage._make(await stage.journal.read("s", ORIGIN, 1000, 10**6))
    reader = Reader(stage.tails, "s", view, ORIGIN, page)
    before(reader)
    readers = Readers(15, 30)
    released: list[bool] = []
    answer = StreamAnswer(
        reader, 201, [(b"a", b"b")], b"primed", whole, lambda: released.append(len(readers) == 0)
    )
    end = await serve_reader(answer, readers, {"extensions": {CONNECTION: connection}}, connection.send, gzip)
    assert released == [True]
    assert connection.begun
    assert connection.on_lost is None
    return end


def view(control: str = "none") -> EventsView:
    return EventsView("r", control, False, False)


def test_a_reader_that_ended_is_a_whole_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", end=True)
            connection = Connection()
            assert await serve(stage, connection, view()) is ReaderEnd.ENDED
            assert connection.messages[0] == {
                "type": "http.response.start",
                "status": 201,
                "headers": [(b"a", b"b")],
            }
            assert connection.body.startswith(b"primedid: 2-")
            assert connection.whole
            assert not connection.broken

    asyncio.run(test())


@pytest.mark.parametrize(("complete", "end"), [(True, "ended"), (False, "ended"), (True, "rotate")])
def test_what_is_not_the_whole_is_broken_off(tmp_path: Path, complete: bool, end: str) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", end=True)
            connection = Connection()

            async def whole(reader: Reader) -> bool:
                assert reader.terminal is not None
                return complete

            def before(reader: Reader) -> None:
                if end == "rotate":
                    reader.leave(ReaderEnd.ROTATE)

            assert await serve(stage, connection, view(), whole=whole, before=before) == end
            intact = complete and end == "ended"
            assert (connection.whole, connection.broken) == (intact, not intact)

    asyncio.run(test())


def test_p8_loss_that_cannot_be_told_is_no_whole_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", "b", "c", end=True)
            await stage.journal.trim("s", 4)
            connection = Connection()
            assert await serve(stage, connection, view()) is ReaderEnd.ERROR
            assert connection.broken
            assert not connection.whole

    asyncio.run(test())


def test_a_client_that_leaves_ends_its_reader(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            connection = Connection()
            serving = asyncio.create_task(serve(stage, connection, view("events")))
            await connection.live.wait()
            assert connection.on_lost is not None
            connection.on_lost()
            assert await serving is ReaderEnd.CLIENT_CLOSED

    asyncio.run(test())


def test_nothing_left_is_204_without_a_body() -> None:
    connection = Connection()
    asyncio.run(send_no_content(connection.send))
    assert connection.messages[0]["status"] == 204
    assert (b"vary", b"Last-Event-ID") in connection.messages[0]["headers"]
    assert connection.body == b""


def test_nothing_left_of_a_whole_answer_has_its_media_type() -> None:
    connection = Connection()
    asyncio.run(send_no_content(connection.send, "text/event-stream"))
    assert (b"content-type", b"text/event-stream") in connection.messages[0]["headers"]


def test_an_error_is_a_problem_document() -> None:
    for error, status in ((UnknownStream("No such stream.", stream="s"), 404), (Busy(), 503)):
        connection = Connection()
        asyncio.run(send_problem(error, connection.send))
        headers = dict(connection.messages[0]["headers"])
        assert connection.messages[0]["status"] == status
        assert headers[b"content-type"] == b"application/problem+json"
        assert headers[b"content-length"] == b"%d" % len(connection.body)
        assert (b"retry-after" in headers) is (status == 503)
        assert json.loads(connection.body) == error.problem()


@pytest.mark.parametrize(
    ("compress", "host", "gzip"),
    [
        ("remote", "192.0.2.1", True),
        ("remote", "2001:db8::1", True),
        ("remote", "::ffff:192.0.2.1", True),
        ("remote", "127.0.0.1", False),
        ("remote", "127.8.8.8", False),
        ("remote", "::1", False),
        ("remote", "::ffff:127.0.0.1", False),
        ("remote", "fe80::1%eth0", True),
        ("remote", None, False),
        ("always", "127.0.0.1", True),
        ("always", None, True),
        ("never", "192.0.2.1", False),
    ],
)
def test_who_gets_streams_compressed(compress: str, host: str | None, gzip: bool) -> None:
    client = None if host is None else (host, 40000)
    accepts = [(b"accept-encoding", b"deflate"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip")]
    assert takes_gzip({"client": client, "headers": accepts}, compress) is gzip
    assert not takes_gzip({"client": client, "headers": accepts[:2]}, compress)


@pytest.mark.parametrize("complete", [True, False])
def test_a_compressed_answer_is_a_whole_member_only_if_it_is_a_whole_answer(
    tmp_path: Path, complete: bool
) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", end=True)
            connection = Connection()

            async def whole(reader: Reader) -> bool:
                return complete

            await serve(stage, connection, view(), whole=whole, gzip=True)
            assert (b"content-encoding", b"gzip") in connection.messages[0]["headers"]
            member = zlib.decompressobj(31)
            assert member.decompress(connection.body).startswith(b"primedid: 2-")
            assert member.eof is complete

    asyncio.run(test())
