from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidName, StartupError
from relay.ingest.naming import naming_rules, parse_json, stream_routes


def find(*settings: str, path: str = "/", headers: dict[str, str] | None = None, body: Any = None) -> str:
    given_headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return naming_rules(settings).find(path, given_headers, body)


@pytest.mark.parametrize(
    ("rule", "path", "name"),
    [
        ("path:/chat/{stream}", "/chat/c1", "c1"),
        ("path:/chat/{stream}", "/chat/c%2D1", "c-1"),
        ("path:/chat/{stream}/go", "/chat/c1/go", "c1"),
        ("path:/chat/{stream}", "/chat/c1/go", ""),
        ("path:/chat/{stream}", "/chat/", ""),
        ("path:/a.b/{stream}", "/aXb/c1", ""),
    ],
)
def test_a_path_rule_takes_one_segment(rule: str, path: str, name: str) -> None:
    assert find(rule, path=path) == name


def test_a_segment_that_is_no_name_is_not_skipped() -> None:
    """Whether it matters is known when the answer is: only a stream needs a name."""
    assert find("path:/chat/{stream}", path="/chat/a%2Fb") == "a/b"


@pytest.mark.parametrize(
    ("pointer", "body", "name"),
    [
        ("/id", {"id": "c1"}, "c1"),
        ("/id", {"id": 17}, "17"),
        ("/a/b", {"a": {"b": "c1"}}, "c1"),
        ("/messages/1/id", {"messages": [{}, {"id": "c1"}]}, "c1"),
        ("/a~1b/c~0d", {"a/b": {"c~d": "c1"}}, "c1"),
        ("/id", {"id": True}, ""),
        ("/id", {"id": None}, ""),
        ("/id", {"id": {"x": 1}}, ""),
        ("/id", ["id"], ""),
        ("/7", [1], ""),
        ("/id", None, ""),
        ("/id/x", {"id": "c1"}, ""),
    ],
)
def test_a_body_rule_is_a_json_pointer_to_a_string_or_number(pointer: str, body: Any, name: str) -> None:
    assert find(f"body:{pointer}", body=body) == name


def test_a_header_rule_takes_the_header_whatever_its_case() -> None:
    assert find("header:X-Chat", headers={"x-chat": "c1"}) == "c1"
    assert find("header:X-Chat") == ""


def test_the_first_rule_that_finds_a_name_wins() -> None:
    rules = ("header:X-Chat", "body:/id")
    assert find(*rules, headers={"x-chat": "h"}, body={"id": "b"}) == "h"
    assert find(*rules, body={"id": "b"}) == "b"


def test_only_a_body_rule_needs_the_body() -> None:
    assert naming_rules(["body:/id"]).needs_body
    assert not naming_rules(["header:X", "path:/{stream}"]).needs_body


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "path",
        "path:chat/{stream}",
        "path:/chat",
        "path:/{stream}/{stream}",
        "body:id",
        "header:",
        "query:x",
    ],
)
def test_a_rule_that_cannot_be_read_stops_the_start_and_says_how_to_write_it(setting: str) -> None:
    with pytest.raises(StartupError, match="json/pointer"):
        naming_rules([setting])


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/api/chat/c1/stream", "c1"),
        ("GET", "/api/chat/c%2D1/stream", "c-1"),
        ("GET", "/v2/c1", "c1"),
        ("POST", "/api/chat/c1/stream", ""),
        ("GET", "/api/chat/c1/stream/", ""),
        ("GET", "/api/chat/a/b/stream", ""),
        ("GET", "/api/chat//stream", ""),
    ],
)
def test_a_route_is_a_method_and_a_path_with_the_streams_name(method: str, path: str, name: str) -> None:
    assert stream_routes("--x", ["GET /api/chat/{stream}/stream", "GET /v2/{stream}"])(method, path) == name
    assert stream_routes("--x", [])(method, path) == ""


@pytest.mark.parametrize("route", ["", "GET", "/a/{stream}", "get /a/{stream}", "GET /a", "GET a/{stream}"])
def test_a_route_that_cannot_be_read_stops_the_start_and_names_its_flag(route: str) -> None:
    with pytest.raises(StartupError, match="--resume-route"):
        stream_routes("--resume-route", [route])


@given(st.binary())
def test_any_body_is_json_or_none(body: bytes) -> None:
    parse_json(body)


@given(st.text(), st.text(alphabet="/~01ab%", max_size=12))
def test_any_path_and_pointer_give_a_name_or_are_refused(path: str, pointer: str) -> None:
    rules = naming_rules(["path:/x/{stream}", "body:/" + pointer])
    try:
        rules.find("/x/" + path, [], {"a": [1, {"b": "c"}]})
    except InvalidName:
        pass
