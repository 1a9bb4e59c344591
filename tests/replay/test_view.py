"""relay.replay.view: how each kind of reader is shown frames."""

from __future__ import annotations

import json

import pytest

from relay.cursor import Cursor
from relay.frame import Frame, run_ended, run_started
from relay.lifecycle import Reason, ending
from relay.replay.view import EventsView, NdjsonView, ProxiedNdjsonView, ProxiedSseView, View, chunk
from relay.sse import encode_wire

ENDED = run_ended("r", ending(Reason.UPSTREAM_END), 2, 5)
FRAMES = [
    Frame(1, 1000, "r", "relay", run_started("r", None, None)),
    Frame(2, 1001, "r", "delta", b"one\ntwo"),
    Frame(3, 1002, "other", "", b"theirs"),
    Frame(4, 1003, "r", "", b"three"),
    Frame(5, 1004, "r", "relay", ENDED),
    Frame(6, 1005, "other", "", b"theirs too"),
]
STARTED = FRAMES[0].data.decode()
DATA = "id: 2-1001\nevent: delta\ndata: one\ndata: two\n\n"


def shown(view: View, frames: list[Frame] = FRAMES) -> str:
    return chunk(view, frames, [encode_wire(frame) for frame in frames]).data.decode()


def events(control: str = "events", *, run: str | None = "r", envelope: bool = False) -> EventsView:
    return EventsView(run, control, envelope, False)


def test_events_are_blocks_under_their_cursor() -> None:
    assert shown(events()) == (
        f"id: 1-1000\nevent: relay\ndata: {STARTED}\n\n{DATA}"
        f"id: 4-1003\ndata: three\n\nid: 5-1004\nevent: relay\ndata: {ENDED.decode()}\n\n"
    )
    assert shown(events("none")) == f"{DATA}id: 4-1003\ndata: three\n\n"
    assert shown(events("comments")) == (
        f": relay {STARTED}\nid: 1-1000\n\n{DATA}id: 4-1003\ndata: three\n\n"
        f": relay {ENDED.decode()}\nid: 5-1004\n\n"
    )
    assert shown(events("none", run=None)).count("theirs") == 2


def test_an_envelope_is_an_unnamed_event_with_the_frame_object() -> None:
    block, _ = shown(events("none", envelope=True)).split("\n\n", 1)
    id_, data = block.split("\n")
    assert id_ == "id: 2-1001"
    assert json.loads(data.removeprefix("data: ")) == {
        "id": "2-1001", "event": "delta", "data": "one\ntwo", "run": "r", "at": "1970-01-01T00:00:01.001Z",
    }  # fmt: skip
    assert ": relay {" in shown(events("comments", envelope=True))


def test_lines_are_frame_objects() -> None:
    lines = [json.loads(line) for line in shown(NdjsonView("r", "events", False)).splitlines()]
    assert [line["id"] for line in lines] == ["1-1000", "2-1001", "4-1003", "5-1004"]
    lines = [json.loads(line) for line in shown(NdjsonView("r", "none", False)).splitlines()]
    assert [line["data"] for line in lines] == ["one\ntwo", "three"]


def test_p9_a_proxied_run_is_upstreams_events_and_nothing_else() -> None:
    view = ProxiedSseView("r", "T" * 22, "text/event-stream")
    prefix = f"id: rly.{'T' * 22}."
    assert shown(view) == f"{prefix}{DATA.removeprefix('id: ')}{prefix}4-1003\ndata: three\n\n"
    assert view.notice("bye", Cursor(1, 1), reason="rotate", retry_ms=5) == b""
    assert view.heartbeat(Cursor(1, 1)) == b": hb\n"
    assert view.prime(7).decode() == f'{prefix}0-0\nretry: 7\nevent: relay\ndata: {{"type":"hello"}}\n\n'
    lines = ProxiedNdjsonView("r", "application/x-ndjson")
    assert shown(lines, [FRAMES[0], FRAMES[3], FRAMES[4]]) == "three\n"
    assert lines.notice("bye", None) == lines.heartbeat(Cursor(1, 1)) == b""


def test_a_chunk_stops_behind_the_end_of_its_run() -> None:
    wires = [encode_wire(frame) for frame in FRAMES]
    found = chunk(events(), FRAMES, wires)
    assert (found.last, found.terminal) == (Cursor(5, 1004), FRAMES[4])
    found = chunk(events(run=None), FRAMES, wires)
    assert (found.last, found.terminal) == (Cursor(6, 1005), None)
    found = chunk(events(run="nobody"), FRAMES, wires)
    assert found == (b"", Cursor(6, 1005), None, 0)
    found = chunk(events("none"), FRAMES[:1], wires[:1])
    assert found == (b"", Cursor(1, 1000), None, 0)


@pytest.mark.parametrize("run", [None, "r"])
def test_a_notice_carries_the_position_it_establishes(run: str | None) -> None:
    at, bye = Cursor(4, 1003), {"reason": "drain", "retry_ms": 9}
    data = '{"type":"bye","reason":"drain","retry_ms":9}'
    told = events(run=run).notice("bye", at, **bye).decode()
    assert told == f"id: 4-1003\nretry: 9\nevent: relay\ndata: {data}\n\n"
    assert events(run=run).notice("bye", None, **bye).decode() == told.removeprefix("id: 4-1003\n")
    assert events("none", run=run).notice("bye", at, **bye) == b"retry: 9\n\n"
    assert events("none", run=run).notice("live", at) == b""
    assert events("comments", run=run).notice("bye", at, **bye).decode() == (
        f"retry: 9\n\n: relay {data}\nid: 4-1003\n\n"
    )
    line = json.loads(NdjsonView(run, "events", False).notice("bye", at, **bye))
    assert (line["id"], line["event"], line["data"], line["run"]) == ("4-1003", "relay", data, None)
    assert NdjsonView(run, "none", False).notice("bye", at, **bye) == b""
    envelope = events(run=run, envelope=True).notice("bye", at, **bye).decode()
    assert envelope.startswith('id: 4-1003\nretry: 9\ndata: {"id":"4-1003","event":"relay",')


def test_heartbeats_are_comments_unless_a_script_asked_to_see_them() -> None:
    at = Cursor(4, 1003)
    assert events().heartbeat(at) == b": hb\n"
    beat = b'id: 4-1003\nevent: relay\ndata: {"type":"heartbeat"}\n\n'
    assert EventsView(None, "none", False, True).heartbeat(at) == beat
    assert NdjsonView(None, "events", False).heartbeat(at) == b"\n"
    assert json.loads(NdjsonView(None, "none", True).heartbeat(at))["id"] == "4-1003"


def test_views_that_encode_alike_share_and_others_do_not() -> None:
    alike = EventsView("r", "none", False, True), EventsView("r", "none", False, False)
    assert alike[0].key == alike[1].key
    others = [
        *(events(), events("none"), events("comments"), events(run=None), events(envelope=True)),
        *(
            NdjsonView("r", "events", False),
            NdjsonView("r", "none", False),
            NdjsonView(None, "events", False),
        ),
        *(ProxiedSseView("r", "a", "t"), ProxiedSseView("r", "b", "t"), ProxiedNdjsonView("r", "t")),
    ]
    assert len({view.key for view in others}) == len(others)


def test_only_readers_who_see_notices_can_be_told_of_loss() -> None:
    tells = {control: events(control).tells_loss for control in ("events", "comments", "none")}
    assert tells == {"events": True, "comments": True, "none": False}
    assert NdjsonView(None, "events", False).tells_loss
    assert not NdjsonView(None, "comments", False).tells_loss
    assert not ProxiedSseView("r", "t", "").tells_loss
    assert not ProxiedNdjsonView("r", "").tells_loss
