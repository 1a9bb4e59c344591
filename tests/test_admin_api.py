"""The routes that concern no single stream: what a prefix deletes."""

from __future__ import annotations

import json

import pytest
from guarded import ask
from relay_process import RelayProcess


def names(relay: RelayProcess, prefix: str) -> list[str]:
    """The streams whose names begin so."""
    found: list[str] = []
    after = ""
    while True:
        page = json.loads(ask(relay.url, "GET", f"/relay/v1/streams?after={after}&limit=1000").body)
        found += [entry["stream"] for entry in page["streams"] if entry["stream"].startswith(prefix)]
        if not page["more"]:
            return found
        after = page["after"]


def test_a_prefix_deletes_the_names_that_begin_so_and_no_neighbour(relay: RelayProcess, name: str) -> None:
    inside = [f"{name}.a", f"{name}.a.b", f"{name}.a~", f"{name}.a-", f"{name}.aZ", f"{name}.a:x"]
    outside = [name, f"{name}.", f"{name}.b", f"{name}.A", f"{name}.Z", f"{name}~", f"x{name}.a"]
    for stream in (*inside, *outside):
        assert ask(relay.url, "PUT", f"/relay/v1/streams/{stream}").status == 201
    answer = ask(relay.url, "DELETE", f"/relay/v1/streams?prefix={name}.a")
    assert json.loads(answer.body) == {"prefix": f"{name}.a", "deleted": len(inside)}
    assert sorted(names(relay, name) + names(relay, f"x{name}")) == sorted(outside)


@pytest.mark.parametrize(
    "prefix",
    ["", "*", "%25", "_%25", "t*", "[a-z]", "?", "%27%20OR%201=1--", "%00", "a%0A", "{a}", "%FF", "a/b"],
)
def test_a_prefix_that_no_name_begins_with_deletes_nothing(
    relay: RelayProcess, name: str, prefix: str
) -> None:
    """Nothing in it is a pattern, whatever the journal's language makes of it."""
    assert ask(relay.url, "PUT", f"/relay/v1/streams/{name}").status == 201
    answer = ask(relay.url, "DELETE", f"/relay/v1/streams?prefix={prefix}")
    assert answer.status == 400
    assert names(relay, name) == [name]
