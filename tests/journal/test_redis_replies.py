"""What a journal in Redis answers means to who asked."""

from __future__ import annotations

import hiredis
import msgpack  # type: ignore[import-untyped]
import pytest

from relay.cursor import Cursor
from relay.errors import (
    Diverged,
    Fenced,
    JournalError,
    RelayError,
    Rewound,
    RunEnded,
    SequenceGap,
    UnknownRun,
    UnknownStream,
)
from relay.frame import Frame
from relay.journal.redis_replies import (
    frames_of,
    frames_told,
    refuse,
    refuse_errors,
    server_details,
    within,
)


@pytest.mark.parametrize(
    ("reply", "error", "extra"),
    [
        ([b"unknown_stream"], UnknownStream, {}),
        ([b"unknown_run"], UnknownRun, {}),
        ([b"fenced"], Fenced, {}),
        ([b"sequence_gap", 4], SequenceGap, {"expected": 4}),
        ([b"rewound", 7], Rewound, {"last_seq": 7}),
        ([b"diverged", 7], Diverged, {"last_seq": 7}),
        ([b"run_ended", b"cancelled", b"superseded"], RunEnded,
         {"run_status": "cancelled", "reason": "superseded"}),
    ],
)  # fmt: skip
def test_what_a_script_says_instead_of_ok_is_raised(
    reply: list[object], error: type[RelayError], extra: dict[str, object]
) -> None:
    with pytest.raises(error) as caught:
        refuse(reply, "s", "r")
    assert extra.items() <= caught.value.extra.items()


def test_ok_is_passed_on() -> None:
    assert refuse([b"ok", 1], "s") == [b"ok", 1]
    assert refuse_errors([b"a", [1]]) == [b"a", [1]]


def test_an_error_among_replies_is_the_journals() -> None:
    error = hiredis.ReplyError("LOADING Redis is loading the dataset in memory")
    for replies in (error, [b"a", error]):
        with pytest.raises(JournalError):
            refuse_errors(replies)


def test_entries_and_messages_are_the_same_frames() -> None:
    frames = [Frame(4, 100, "r", "", b"a"), Frame(5, 100, "r", "relay", b"\xff")]
    entries = [
        [
            f"{frame.seq}-{frame.ms}".encode(),
            [b"r", frame.run.encode(), b"e", frame.event.encode(), b"d", frame.data],
        ]
        for frame in frames
    ]
    assert frames_of(entries) == frames
    flat = [part for frame in frames for part in (frame.run.encode(), frame.event.encode(), frame.data)]
    assert frames_told(msgpack.packb([3, 99, 100, *flat])) == (Cursor(3, 99), frames)


def test_a_page_ends_with_the_frame_that_reaches_its_bytes() -> None:
    frames = [Frame(seq, 1, "r", "", b"12345") for seq in range(1, 5)]
    assert [len(within(frames, size)) for size in (0, 1, 5, 6, 19, 20, 21)] == [1, 1, 1, 2, 4, 4, 4]


def test_what_a_server_does_not_tell_is_unknown_and_not_nothing() -> None:
    details = server_details({"redis_version": "7.2.4", "used_memory": "12", "aof_enabled": "1"})
    assert (details["server"], details["memory_bytes"], details["aof"]) == ("redis", 12, True)
    assert details["memory_max_bytes"] is None
    assert details["aof_last_write_ok"]
    assert server_details({"valkey_version": "8.0"})["server"] == "valkey"
