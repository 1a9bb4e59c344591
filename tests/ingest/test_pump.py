"""How a run ends, by how its upstream ended: exactly once, for the stated reason, with what came before."""

from __future__ import annotations

import json
import threading

import pytest
from raw_client import RawClient
from reading import Reading
from relay_process import RelayProcess
from run_record import RunRecord, whole_run
from scripted_upstream import Exchange, ScriptedUpstream

FRAME_MAX_BYTES = 1024 * 1024


def run_to_its_end(
    relay: RelayProcess, name: str, path: str = ""
) -> tuple[list[tuple[str, str]], bool, RunRecord]:
    """What a client saw, whether its answer was whole, and what was journaled."""
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}{path}", f"Relay-Stream: {name}", body=b"{}")
        answer = client.answer()
    assert answer.status == 200
    blocks = [block.split("\n") for block in answer.body.decode().split("\n\n") if "data: " in block]
    seen = [
        (
            next((line[7:] for line in block if line.startswith("event: ")), ""),
            "\n".join(line[6:] for line in block if line.startswith("data: ")),
        )
        for block in blocks
    ]
    return seen, answer.whole, whole_run(relay, name)


CHUNK = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'


# --- raw ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "body", "outcome"),
    [
        ("Transfer-Encoding: chunked", b"b\r\ndata: one\n\n\r\n0\r\n\r\n", ("completed", "upstream_end")),
        ("Content-Length: 11", b"data: one\n\n", ("completed", "upstream_end")),
        ("X-Close: delimited", b"data: one\n\n", ("completed", "upstream_end")),
        ("Transfer-Encoding: chunked", b"b\r\ndata: one\n\n\r\n", ("failed", "upstream_truncated")),
        ("Transfer-Encoding: chunked", b"b\r\ndata: one\n\n\r\nff\r\nda", ("failed", "upstream_truncated")),
        ("Content-Length: 99", b"data: one\n\n", ("failed", "upstream_truncated")),
    ],
)
def test_p3_a_raw_stream_ends_as_its_framing_ended(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    head: str,
    body: bytes,
    outcome: tuple[str, str],
) -> None:
    async def handler(exchange: Exchange) -> None:
        lines = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n{head}\r\n\r\n"
        await exchange.send(lines.encode() + body)
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    seen, whole, record = run_to_its_end(relay, name)
    assert seen == [("", "one")]
    assert whole == (outcome[0] == "completed")
    assert record.texts == ["one"]
    assert record.outcome == outcome
    assert (record.ended["frames"], record.ended["text_bytes"]) == (1, 3)
    assert ("error" in record.ended) == (outcome[0] == "failed")


def test_frames_received_before_a_reset_are_kept(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for n in range(500):
            await exchange.chunk(b"data: %d\n\n" % n)
        await exchange.send(b"5\r\nhalf")
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    seen, whole, record = run_to_its_end(relay, name)
    assert record.texts == [str(n) for n in range(500)]
    assert [data for _, data in seen] == record.texts
    assert not whole


# --- a dialect with a marker --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/other"])
def test_a_stream_without_its_terminal_marker_is_truncated_and_says_so(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, path: str
) -> None:
    upstream.on_stream(f"/{name}{path}", [CHUNK])
    seen, whole, record = run_to_its_end(relay, name, path)
    assert whole  # its format has said that it is not
    assert len(seen) == 2
    assert json.loads(seen[1][1])["error"]["code"] == "upstream_truncated"
    assert record.texts == [data for _, data in seen]
    assert record.outcome == ("failed", "upstream_truncated")
    assert (record.ended["frames"], record.ended["text_bytes"]) == (1, 2), "what relay says is not counted"


def test_an_answer_without_any_event_is_truncated_where_the_path_tells_the_format(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}/chat/completions", [])
    seen, _, record = run_to_its_end(relay, name, "/chat/completions")
    assert json.loads(seen[0][1])["error"]["code"] == "upstream_truncated"
    assert record.outcome == ("failed", "upstream_truncated")


def test_p3_the_terminal_marker_ends_the_run_before_the_connection_ends(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """And upstream is not cut off: what it does after its last word would be cancelled."""
    gate, finished = upstream.gate(), threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(CHUNK + b"data: [DONE]\n\ndata: late\n\n")
        await gate.wait()
        await exchange.chunk(b"data: later\n\n")
        await exchange.end()
        finished.set()

    upstream.on(f"/{name}", handler)
    seen, whole, record = run_to_its_end(relay, name)
    assert [data for _, data in seen][1:] == ["[DONE]"]
    assert whole
    assert record.outcome == ("completed", "upstream_end")
    assert record.ended["frames"] == 2
    gate.open()
    assert finished.wait(60)


def test_upstreams_own_error_event_ends_the_run_and_is_not_said_twice(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [CHUNK, b'data: {"error": {"message": "overloaded"}}\n\n', CHUNK])
    seen, _, record = run_to_its_end(relay, name)
    assert len(seen) == 2
    assert record.outcome == ("failed", "upstream_error")
    assert record.ended["error"] == "overloaded"


@pytest.mark.parametrize("message", ["", "   ", "x" * 100_000, "\u20ac" * 4000])
def test_an_error_is_never_empty_and_cut_at_4_kib(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, message: str
) -> None:
    error = json.dumps({"error": {"message": message}}).encode()
    upstream.on_stream(f"/{name}/chat/completions", [b"data: " + error + b"\n\n"])
    _, _, record = run_to_its_end(relay, name, "/chat/completions")
    said = record.ended["error"]
    assert said.strip()
    assert len(said.encode()) <= 4096
    assert said.endswith("[cut]") == (len(message) > 1000)


# --- frames that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [FRAME_MAX_BYTES, FRAME_MAX_BYTES + 1])
def test_a_frame_has_a_largest_size_and_those_before_it_are_kept(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, size: int
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n", b"data: " + b"x" * size + b"\n\n"])
    _, whole, record = run_to_its_end(relay, name)
    if size > FRAME_MAX_BYTES:
        assert record.outcome == ("failed", "frame_too_large")
        assert record.texts == ["one"]
        assert record.ended["error"]
    else:
        assert record.outcome == ("completed", "upstream_end")
        assert [len(text) for text in record.texts] == [3, size]
    assert whole == (size <= FRAME_MAX_BYTES)


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/x-ndjson"])
def test_an_endless_line_is_too_large_a_frame(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, content_type: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", content_type)
        try:
            while True:
                await exchange.chunk(b"data: " + b"x" * 60_000)
        finally:
            closed.set()

    upstream.on(f"/{name}", handler)
    _, whole, record = run_to_its_end(relay, name)
    assert not whole
    assert record.outcome == ("failed", "frame_too_large")
    assert closed.wait(60)


def test_the_reserved_event_name_is_refused_and_frames_before_it_are_kept(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    forged = b'event: relay\ndata: {"type":"run.ended"}\n\n'
    upstream.on_stream(f"/{name}", [b"data: one\n\n" + forged + b"data: two\n\n"])
    seen, whole, record = run_to_its_end(relay, name)
    assert (seen, whole) == ([("", "one")], False)
    assert record.texts == ["one"]
    assert record.outcome == ("failed", "invalid_frame")


@pytest.mark.parametrize("event", ["relayed", "Relay", " relay", "error", "message", "run.ended"])
def test_other_event_names_are_upstreams(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, event: str
) -> None:
    upstream.on_stream(f"/{name}", [f"event: {event}\ndata: x\n\n".encode()])
    seen, whole, record = run_to_its_end(relay, name)
    assert seen == [(event, "x")]
    assert whole
    assert record.outcome == ("completed", "upstream_end")


def test_p7_a_reader_that_resumes_sees_the_error_too(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(CHUNK)
        await gate.wait()
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as reading:
        cursor = reading.take(1)[0].id
    gate.open()
    whole_run(relay, name)
    with Reading(f"{relay.url}/{name}", Last_Event_ID=cursor) as reading:
        (frame,) = reading.frames()
        last = reading.last_id
    assert json.loads(frame.data)["error"]["code"] == "upstream_truncated"
    with Reading(f"{relay.url}/{name}", Last_Event_ID=last) as reading:
        assert reading.status == 204
