"""relay answers what its description says, whatever is asked; a short slice of `python3 dev.py soak api`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import guarded
import pytest
from conformance import api_fuzz
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

SEED = secrets.randbelow(1_000_000)

EXAMPLES = 2

LIMIT_S = 300


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def short_lived(
    request: pytest.FixtureRequest, upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RelayProcess]:
    """A relay whose streams end soon: on SQLite one that anybody may use, on Redis one with keys."""
    journal, options = f"sqlite:///{tmp_path_factory.mktemp('fuzzed') / 'relay.db'}", api_fuzz.SETTINGS
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        journal, options = server.url(), options | guarded.SETTINGS | {"redis_prefix": "fuzzed"}
    with RelayProcess.start(journal=journal, upstream=upstream.url, **options) as relay:
        yield relay


@pytest.fixture(scope="module")
def credential(short_lived: RelayProcess) -> str:
    """The key that relay was started with, "" for none; not what it asks for, which is to be found out."""
    return guarded.ADMIN_KEY if guarded.ADMIN_KEY in short_lived.process.args else ""


def test_made_up_requests_are_answered_as_described(
    short_lived: RelayProcess, credential: str, tmp_path: Path
) -> None:
    assert api_fuzz.FUZZER.is_dir(), "This test needs schemathesis. `python3 dev.py setup` installs it."
    print(f"--seed {SEED}")
    outcome = api_fuzz.fuzz(short_lived.url, tmp_path, SEED, EXAMPLES, credential, timeout_s=LIMIT_S)
    assert outcome.passed, outcome.said
    assert not [line for line in short_lived.log if "Traceback" in line]


# --- what streams hold ---------------------------------------------------------------------------------

queries = st.fixed_dictionaries(
    {},
    optional={
        "after": st.sampled_from(["start", "tail", "0-0", "1-1", "3-0", "999-999"]),
        "run": st.sampled_from(["current", "latest", "r1", "r2", "unknown"]),
        "control": st.sampled_from(["events", "comments", "none"]),
        "envelope": st.just("json"),
        "heartbeat": st.just("event"),
        "wait": st.just("0.02"),
    },
)


def validator(name: str) -> Draft202012Validator:
    """For a schema of the description; objects may have no members that are not described."""
    document = api_fuzz.strict_description(guarded=False)
    return Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})


FRAME, NOTICE, CONTROL = validator("Frame"), validator("Notice"), validator("ControlFrame")


def check_item(item: dict[str, Any]) -> None:
    """A line of NDJSON, or the data of an enveloped event."""
    (NOTICE if item["run"] is None else FRAME).validate(item)
    if item["event"] == "relay":
        CONTROL.validate(json.loads(item["data"]))


def check_event(block: bytes, enveloped: bool) -> None:
    """A block of an event stream, of which the producer's events hold text."""
    fields = [line.partition(b": ")[::2] for line in block.splitlines() if not line.startswith(b":")]
    said = {name.decode(): value for name, value in fields}
    assert set(said) <= {"id", "event", "data", "retry"}
    if enveloped and "data" in said:
        check_item(json.loads(said["data"]))
    elif said.get("event") == b"relay":
        CONTROL.validate(json.loads(said["data"]))
    for line in block.splitlines():
        if line.startswith(b": relay "):
            CONTROL.validate(json.loads(line[8:]))


@pytest.fixture(scope="module")
def filled(short_lived: RelayProcess, credential: str) -> tuple[str, dict[str, str]]:
    """A stream with a run that was superseded by an open one; and what lets it be read."""
    name, heads = "filled", guarded.bearer(credential) if credential else {}
    for run in ("r1", "r2"):
        path = f"/relay/v1/streams/{name}/runs"
        wishes = {"run": run, "if_busy": "supersede", "metadata": {"n": 1}}
        opened = guarded.ask(
            short_lived.url,
            "POST",
            path,
            json.dumps(wishes).encode(),
            Content_Type="application/json",
            **heads,
        )
        writer = json.loads(opened.body)["writer"]
        frames = b'[{"data": "one\\ntwo"}, {"event": "delta", "data": {"text": "three"}}]'
        more = {"Content_Type": "application/json", "Relay_Writer": writer} | heads
        answer = guarded.ask(short_lived.url, "POST", f"{path}/{run}/frames", frames, **more)
        assert answer.status == 200
    return name, heads


def test_what_streams_hold_is_described(
    short_lived: RelayProcess, filled: tuple[str, dict[str, str]]
) -> None:
    """Each control frame and each frame, however a reader wishes them shown."""
    name, heads = filled
    seen: set[int] = set()

    @seed(SEED)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        queries,
        st.sampled_from(["text/event-stream", "application/x-ndjson"]),
        st.sampled_from([name, "none"]),
    )
    def read(query: dict[str, str], accept: str, stream: str) -> None:
        path = f"/relay/v1/streams/{stream}/events?{urlencode(query)}"
        answer = guarded.ask(short_lived.url, "GET", path, Accept=accept, **heads)
        seen.add(answer.status)
        assert answer.status in (200, 204, 404, 410), answer
        if answer.status != 200:
            return
        assert answer.headers["content-type"].partition(";")[0] == accept
        if accept == "application/x-ndjson":
            for line in filter(None, answer.body.split(b"\n")):
                check_item(json.loads(line))
        else:
            for block in answer.body.split(b"\n\n"):
                check_event(block, "envelope" in query)

    print(f"--seed {SEED}")
    read()
    assert 200 in seen
