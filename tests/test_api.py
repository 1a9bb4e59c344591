"""relay's own routes as a client meets them: what they tell of streams and runs, and what they refuse."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import pytest
from answering import Agent, answer, problem
from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream


def test_an_unknown_stream_or_route_is_404(relay: RelayProcess, name: str) -> None:
    for path, code in (
        (f"/relay/v1/streams/{name}/events", "unknown_stream"),
        (f"/relay/v1/streams/{name}", "unknown_stream"),
        (f"/relay/v1/streams/{name}/runs/r", "unknown_stream"),
        ("/relay/v1/nothing", "route_not_found"),
        ("/relay", "route_not_found"),
    ):
        got = relay.get(path)
        assert (got[0], problem(got)["code"]) == (404, code)


@pytest.mark.parametrize("stream", ["a b", "a/b", "é", "x" * 201, "..."[:2]])
def test_a_name_that_is_none_is_refused(relay: RelayProcess, stream: str) -> None:
    got = relay.get(f"/relay/v1/streams/{quote(stream, safe='')}/events")
    assert (got[0], problem(got)["code"]) in ((400, "invalid_name"), (404, "route_not_found"))


def test_streams_and_runs_describe_themselves(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    agent = Agent(relay, upstream, name)
    agent.say("one")
    about = relay.json(f"/relay/v1/streams/{name}")
    assert about["stream"] == name
    assert (about["open_runs"], about["latest_run"], about["runs"]) == ([agent.run], agent.run, 1)
    assert (about["sealed"], about["earliest_seq"], about["metadata"]) == (False, 1, None)
    assert about["top"].startswith("2-")
    assert about["retention"].keys() == {"max_frames", "max_bytes", "retention_s"}
    run = relay.json(f"/relay/v1/streams/{name}/runs/{agent.run}")
    assert (run["status"], run["reason"], run["ended"], run["frames"]) == ("open", None, None, 1)
    agent.end()
    run = relay.json(f"/relay/v1/streams/{name}/runs/{agent.run}")
    assert (run["status"], run["reason"], run["start"]) == ("completed", "upstream_end", "0-0")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", run["ended"])
    assert not {"token", "writer", "answer"} & run.keys()
    token = agent.resume_ids[0].split(".")[1]
    assert token not in json.dumps(run)


def test_streams_are_listed_by_name_in_pages(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    names = [f"{name}-{n}" for n in range(3)]
    for each in names:
        answer(relay, upstream, each, "one")
    first = relay.json(f"/relay/v1/streams?after={name}&limit=2")
    assert [each["stream"] for each in first["streams"]] == names[:2]
    assert (first["after"], first["more"]) == (names[1], True)
    second = relay.json(f"/relay/v1/streams?after={names[1]}&limit=1")
    assert [each["stream"] for each in second["streams"]] == names[2:]
    got = relay.get("/relay/v1/streams?limit=0")
    assert (got[0], problem(got)["code"]) == (400, "invalid_parameter")


def test_health_readiness_and_metrics_answer(relay: RelayProcess, upstream: ScriptedUpstream) -> None:
    assert relay.json("/relay/healthz") == {"status": "alive"}
    assert relay.json("/relay/readyz") == {"status": "ready", "journal": "up"}
    before = relay.metric('relay_resumes_total{outcome="resumed"}')
    agent = answer(relay, upstream, "", "one", "two")
    with Reading(agent.events, Last_Event_ID=agent.resume_ids[0]) as reading:
        reading.read()
    assert relay.metric('relay_resumes_total{outcome="resumed"}') == before + 1
    status, headers, _ = relay.get("/relay/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert relay.metric("relay_journal_up") == 1
