"""The description of relay's routes says what the code says: no more, no less."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import SETTINGS, ask
from openapi_spec_validator import validate
from relay_process import RelayProcess
from starlette.routing import Route

from relay import errors, limits
from relay.api import Guarded
from relay.app import App
from relay.dialects.detect import BY_NAME
from relay.errors import RelayError, StartupError
from relay.ingest.formats import FORMATS
from relay.ingest.proxy import IF_BUSY, SUPERSEDES_MAX
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, Status
from relay.openapi import DESCRIPTION
from relay.replay.reader import ReaderEnd
from relay.settings import NUMBER_MAX, Settings

ROOT = Path(__file__).resolve().parent.parent

DOCUMENT: dict[str, Any] = json.loads(DESCRIPTION.read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
RESPONSES: dict[str, Any] = DOCUMENT["components"]["responses"]

METHODS = ("get", "put", "post", "delete")

# These answer before a request is one, so that no class of error stands for them.
REFUSED_BY_SERVER = set(
    re.findall(r'_refuse\([^)]*?"([a-z_]+)",', (ROOT / "relay" / "server.py").read_text())
)


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """(`GET /path`, operation) of all that is described."""
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS:
            if method in item:
                yield f"{method.upper()} {path}", item[method]


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """What a node stands for, if it is a reference."""
    while "$ref" in node:
        place: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        node = place
    return node


def codes_of(response: dict[str, Any]) -> set[str]:
    schema = response["content"]["application/problem+json"]["schema"]
    return set(schema["allOf"][1]["properties"]["code"]["enum"])


def raised() -> dict[str, int]:
    """Every code that an answer can have, and its status."""
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RelayError)
    ]
    return {kind.code: kind.status for kind in kinds if not issubclass(kind, StartupError)}


@pytest.fixture
def routes(tmp_path: Path) -> dict[str, Route]:
    """relay's own routes, by method and path."""
    settings = Settings(journal=f"sqlite:///{tmp_path / 'relay.db'}")
    app = App(settings, SqliteJournal(tmp_path / "relay.db"))
    found = [route for route in app._api._router.routes if isinstance(route, Route)]
    return {
        f"{method} {route.path}": route
        for route in found
        for method in (route.methods or ())
        if method != "HEAD"
    }


def test_it_is_a_valid_description() -> None:
    validate(DOCUMENT)


def test_it_has_every_route_and_no_other(routes: dict[str, Route]) -> None:
    assert sorted(dict(operations())) == sorted(routes)


def test_it_says_of_each_route_which_right_it_needs(routes: dict[str, Route]) -> None:
    for name, operation in operations():
        route = routes[name]
        right = route._right if isinstance(route, Guarded) else None
        if name.endswith("/events"):
            right = "read"  # which the endpoint asks for itself
        said = operation["description"].rsplit(". ", 1)[-1]
        assert said == (f"Right: {right}." if right else "Open to everybody: no credential."), name
        schemes = {scheme for choice in operation["security"] for scheme in choice}
        assert ("urlToken" in schemes) == (right == "read"), name
        assert bool(schemes) == bool(right), name
        assert not right or {"401", "403", "404"} <= set(operation["responses"]), name


def test_operations_have_names_of_their_own_and_links_lead_to_them() -> None:
    names = [operation["operationId"] for _, operation in operations()]
    assert len(names) == len(set(names))
    for name, operation in operations():
        for response in operation["responses"].values():
            for link in resolved(response).get("links", {}).values():
                assert link["operationId"] in names, name


def test_what_is_described_for_others_is_used() -> None:
    text = DESCRIPTION.read_text()
    for kind, entries in DOCUMENT["components"].items():
        for name in entries if kind != "securitySchemes" else ():
            # Of a stream's pieces only words speak: its schema is that of a whole body.
            assert f'"#/components/{kind}/{name}"' in text or f"`{name}`" in text, (kind, name)


def test_every_code_of_a_problem_is_in_it_under_its_status_and_no_other() -> None:
    known = raised()
    assert {"malformed_request", "head_too_large", "request_timeout"} <= REFUSED_BY_SERVER
    assert set(SCHEMAS["Problem"]["properties"]["code"]["enum"]) == set(known) | REFUSED_BY_SERVER
    described = {code: int(status) for status, response in RESPONSES.items() for code in codes_of(response)}
    for code, status in described.items():
        assert known.get(code, status) == status
    # The others are answers of proxied paths.
    assert {code for code in known if code not in described} == {
        "upgrade_unsupported",
        *(code for code in known if code.startswith("upstream_")),
    }
    for _, operation in operations():
        for status, response in operation["responses"].items():
            if response.get("$ref", "").startswith("#/components/responses/"):
                assert response["$ref"] == f"#/components/responses/{status}"


def test_the_protocol_lists_the_same_codes() -> None:
    protocol = (ROOT / "PROTOCOL.md").read_text()
    table = protocol.partition("## Codes")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if re.match(r"\| \d", line)]
    listed = {word for row in rows for word in re.findall(r"`([a-z_]+)`", row)}
    # The name of a class of errors, of which only members are raised.
    assert set(SCHEMAS["Problem"]["properties"]["code"]["enum"]) - listed == {"journal_error"}
    assert listed <= set(SCHEMAS["Problem"]["properties"]["code"]["enum"])


def test_its_words_are_those_of_the_code() -> None:
    assert SCHEMAS["Status"]["enum"] == list(Status)
    assert SCHEMAS["Reason"]["enum"] == list(Reason)
    assert sorted(SCHEMAS["Dialect"]["enum"]) == sorted(BY_NAME)
    byes = next(
        kind for kind in SCHEMAS["ControlFrame"]["oneOf"] if kind["properties"]["type"]["const"] == "bye"
    )
    quietly = {ReaderEnd.CLIENT_CLOSED, ReaderEnd.ERROR}
    assert set(byes["properties"]["reason"]["enum"]) == {*set(ReaderEnd) - quietly, "busy", "not_yet"}
    endings = SCHEMAS["Diagnostics"]["properties"]["ended_readers"]["items"]["properties"]["reason"]
    assert set(endings["enum"]) == set(ReaderEnd)
    assert SCHEMAS["IfBusy"]["enum"] == [*IF_BUSY]


def test_its_bounds_are_those_of_the_code() -> None:
    parameters = {
        name: parameter["schema"] for name, parameter in DOCUMENT["components"]["parameters"].items()
    }
    assert parameters["wait"]["maximum"] == limits.WAIT_MAX_S
    assert parameters["limit"]["maximum"] == limits.PAGE_MAX_FRAMES
    assert parameters["Relay-Seq"]["maximum"] == NUMBER_MAX
    opening, change = SCHEMAS["RunOpening"]["properties"], SCHEMAS["StreamChange"]["properties"]
    assert opening["supersedes"]["anyOf"][1]["maxItems"] == SUPERSEDES_MAX
    assert opening["idle_timeout_s"]["maximum"] == limits.IDLE_TIMEOUT_MAX_S
    assert change["retention_s"]["maximum"] == limits.RETENTION_MAX_S
    assert change["max_frames"]["maximum"] == change["max_bytes"]["maximum"] == NUMBER_MAX


@pytest.mark.parametrize(
    "name", ["a", "~", "a" * 200, "a" * 201, "", ".", "..", "...", "current", "latest", "ä"]
)
def test_names_are_those_of_the_code(name: str) -> None:
    for kind, check in (("StreamName", limits.check_stream_name), ("RunName", limits.check_run_name)):
        schema = SCHEMAS[kind]
        described = bool(re.search(schema["pattern"], name)) and name not in schema["not"]["enum"]
        try:
            check(name)
        except errors.InvalidName:
            assert not described, kind
        else:
            assert described, kind


def test_pushed_bodies_are_those_of_the_code() -> None:
    bodies = {
        operation["operationId"]: set(operation["requestBody"]["content"])
        for _, operation in operations()
        if "requestBody" in operation
    }
    streamed = {"application/json", *FORMATS}
    assert bodies.pop("openRun") == bodies.pop("appendFrames") == streamed
    assert all(body == {"application/json"} for body in bodies.values())


def test_it_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert DOCUMENT["info"]["version"] == project["version"]


def test_it_is_served_to_everybody_at_both_addresses(tmp_path: Path) -> None:
    journal = f"sqlite:///{tmp_path / 'relay.db'}"
    settings = SETTINGS | {"admin_addr": "127.0.0.1:0"}
    with RelayProcess.start(journal=journal, **settings) as relay:
        admin = relay.logged_line("admin").rsplit(" ", 1)[-1]
        for url in (relay.url, admin):
            answer = ask(url, "GET", "/relay/openapi.json")
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert answer.body == DESCRIPTION.read_bytes()
            again = ask(url, "GET", "/relay/openapi.json", If_None_Match=answer.headers["etag"])
            assert (again.status, again.body) == (304, b"")
            assert ask(url, "POST", "/relay/openapi.json").code == "method_not_allowed"
