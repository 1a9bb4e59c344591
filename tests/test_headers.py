"""Headers are found by name as often as they were sent, and those of one hop stay behind."""

from __future__ import annotations

from relay.headers import all_of, end_to_end, first_of

SENT = [(b"accept", b" a "), (b"cookie", b"one"), (b"cookie", b"tw\xf6"), (b"empty", b"")]


def test_a_header_is_all_its_values_and_its_first_in_the_order_sent() -> None:
    assert all_of(SENT, b"cookie") == ["one", "tw\xf6"]
    assert first_of(SENT, b"cookie") == "one"
    assert first_of(SENT, b"accept") == "a"


def test_a_header_that_was_not_sent_is_no_value() -> None:
    assert all_of(SENT, b"cook") == []
    assert first_of(SENT, b"cook") == ""
    assert all_of(SENT, b"empty") == [""]


def test_hop_by_hop_headers_and_those_that_connection_names_stay_behind() -> None:
    headers = [
        (b"Connection", b"close, X-Mine"),
        (b"X-Mine", b"1"),
        (b"TE", b"trailers"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Keep-Alive", b"5"),
        (b"Upgrade", b"h2c"),
        (b"Proxy-Authorization", b"secret"),
        (b"X-Drop", b"2"),
        (b"Cookie", b"a"),
        (b"Cookie", b"b"),
    ]
    assert end_to_end(headers, b"x-drop") == [(b"cookie", b"a"), (b"cookie", b"b")]
