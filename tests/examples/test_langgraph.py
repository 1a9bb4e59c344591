"""A real LangGraph Server behind relay, read by LangGraph's own SDK."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import langgraph_sdk
import pytest
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.schema import StreamPart
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from tcp_proxy import TcpProxy

from examples.example import Example, Interlude, once, posted

ANSWER = "Every letter of this answer is an event, and relay has written each of them down before you saw it."
MODES = ["messages-tuple", "values"]


class Scene(NamedTuple):
    """The example, running. `server` is the SDK without relay."""

    example: Example
    relay: RelayProcess
    server: SyncLangGraphClient
    interlude: Interlude

    def runs(self, thread: str) -> list[Any]:
        """The server's runs of a thread."""
        return self.server.runs.list(thread)


@pytest.fixture(scope="module")
def scene(copy: Callable[..., Example]) -> Iterator[Scene]:
    example = copy("langgraph", 2024, 8080)
    add_slow_graph(example)
    with (
        example.server("langgraph dev", 2024, PACE_S="0.01"),
        Interlude.before(example.ports[2024], b"event: messages") as interlude,
        example.relay(upstream=interlude.proxy.url) as relay,
        langgraph_sdk.get_sync_client(url=example.url(2024)) as server,
    ):
        yield Scene(example, relay, server, interlude)


def add_slow_graph(example: Example) -> None:
    """The same graph once more, as `slow`: its answers are not over before something was done to them."""
    config = example.directory / "langgraph.json"
    document = json.loads(config.read_text())
    document["graphs"]["slow"] = "./slow.py:graph"
    config.write_text(json.dumps(document))
    agent = (example.directory / "agent.py").read_text()
    pace = 'os.environ.get("PACE_S", "0.05")'
    assert pace in agent
    (example.directory / "slow.py").write_text(agent.replace(pace, '"0.15"'))


@pytest.fixture
def client(scene: Scene) -> Iterator[SyncLangGraphClient]:
    """The SDK with relay for a server."""
    with langgraph_sdk.get_sync_client(url=scene.relay.url) as sdk:
        yield sdk


@pytest.fixture
def thread() -> str:
    return str(uuid4())


def ask(
    client: SyncLangGraphClient, thread: str, question: str, graph: str = "agent", **wishes: Any
) -> Iterator[StreamPart]:
    return client.runs.stream(
        thread,
        graph,
        input={"messages": [{"role": "user", "content": question}]},
        if_not_exists="create",
        **({"stream_mode": MODES} | wishes),
    )


def text_of(parts: list[StreamPart]) -> str:
    return "".join(part.data[0]["content"] for part in parts if part.event == "messages")


def transcript(relay: RelayProcess, thread: str, run: str = "latest") -> Any:
    return relay.json(f"/relay/v1/streams/{thread}/runs/{run}/transcript")


def test_a_client_that_leaves_goes_on_with_the_command_it_prints(scene: Scene) -> None:
    asking = scene.example.command("client.py hello")
    with scene.interlude.holding(30), scene.example.background(asking) as leaving:
        assert leaving.stdout is not None
        _, thread = leaving.stdout.readline().split()
        shown = leaving.stdout.read(20)
        leaving.send_signal(signal.SIGINT)
        shown += leaving.communicate(timeout=60)[0]
        assert leaving.returncode == 0
    shown, _, go_on = shown.partition("\n")
    assert shown != ANSWER
    assert ANSWER.startswith(shown)
    assert shown + scene.example.shell(go_on.removeprefix("Go on: ")) == ANSWER + "\n"
    assert len(scene.runs(thread)) == 1
    record = whole_run(scene.relay, thread)
    assert record.outcome == ("completed", "upstream_end")
    assert transcript(scene.relay, thread)["text"] == ANSWER


def test_the_sdk_comes_back_by_itself_after_a_cut_and_misses_nothing(scene: Scene, thread: str) -> None:
    after_bytes = {0: 5_000, 1: 10_000}
    with TcpProxy.running(scene.relay.port, plan=after_bytes.get) as proxy:
        with langgraph_sdk.get_sync_client(url=proxy.url, headers={"Accept-Encoding": "identity"}) as client:
            parts = list(ask(client, thread, "hello"))
        assert proxy.connections >= 3
    assert text_of(parts) == ANSWER
    assert len({part.id for part in parts}) == len(parts)
    assert len(scene.runs(thread)) == 1


def test_a_stop_by_relay_keeps_the_text_and_stops_the_graph(
    scene: Scene, client: SyncLangGraphClient, thread: str
) -> None:
    shown = []
    stop = scene.example.command("/cancel").replace("THREAD", thread)
    for part in ask(client, thread, "hello", "slow", on_disconnect="cancel"):
        shown.append(part)
        if len(shown) == 10:
            assert posted(stop)["reason"] == "client_cancel"
    assert (shown[-1].event, shown[-1].data["error"]) == ("error", "client_cancel")
    text = text_of(shown)
    assert 0 < len(text) < len(ANSWER)
    said = transcript(scene.relay, thread)
    assert (said["status"], said["reason"]) == ("cancelled", "client_cancel")
    assert said["text"].startswith(text)
    (run,) = scene.runs(thread)
    ended = once(lambda: (now := scene.server.runs.get(thread, run["run_id"])["status"]) != "running" and now)
    assert ended == "interrupted"


def test_a_run_cancelled_at_the_server_only_ends(
    scene: Scene, client: SyncLangGraphClient, thread: str
) -> None:
    shown = []
    for part in ask(client, thread, "hello", "slow"):
        shown.append(part)
        if len(shown) == 10:
            client.runs.cancel(thread, shown[0].data["run_id"])
    assert 0 < len(text_of(shown)) < len(ANSWER)
    assert {part.event for part in shown} == {"metadata", "values", "messages"}
    assert whole_run(scene.relay, thread).outcome == ("completed", "upstream_end")


def test_a_graph_that_asks_a_human_waits_for_input_and_goes_on_with_the_answer(scene: Scene) -> None:
    said = scene.example.shell(f"echo yes | {scene.example.command('write a mail')}")
    found = re.fullmatch(r"thread (\S+)\n(.*)\nShall I send it as a mail\? Sent\.\n", said)
    assert found is not None, said
    assert found[2] == ANSWER
    listed = scene.example.command("THREAD/runs").replace("THREAD", found[1])
    runs = json.loads(scene.example.shell(listed))["runs"]
    assert [(run["status"], run["reason"]) for run in runs] == [
        ("completed", "input_required"),
        ("completed", "upstream_end"),
    ]
    assert [run["dialect"] for run in runs] == ["langgraph", "langgraph"]


@pytest.mark.parametrize(
    ("modes", "reason"), [(["updates"], "input_required"), (["messages-tuple"], "upstream_end")]
)
def test_an_interrupt_is_seen_in_the_modes_that_show_it(
    scene: Scene, client: SyncLangGraphClient, thread: str, modes: list[str], reason: str
) -> None:
    list(ask(client, thread, "write a mail", stream_mode=modes))
    assert whole_run(scene.relay, thread).outcome == ("completed", reason)


def test_messages_that_are_streamed_whole_are_the_transcript_once(
    scene: Scene, client: SyncLangGraphClient, thread: str
) -> None:
    events = [part.event for part in ask(client, thread, "hello", stream_mode="messages")]
    assert "messages/partial" in events
    assert transcript(scene.relay, thread)["text"] == ANSWER


def test_an_error_of_the_graph_is_the_runs(scene: Scene, client: SyncLangGraphClient, thread: str) -> None:
    parts = list(ask(client, thread, "write a mail", config={"recursion_limit": 1}))
    assert parts[-1].event == "error"
    record = whole_run(scene.relay, thread)
    assert record.outcome == ("failed", "upstream_error")
    assert record.ended["error"] == parts[-1].data["message"]


def test_where_an_answer_is_passes_and_an_id_of_the_servers_own_reaches_the_server(
    scene: Scene, client: SyncLangGraphClient, thread: str
) -> None:
    own = list(ask(scene.server, thread, "hello", stream_resumable=True))
    run = own[0].data["run_id"]
    cursor = own[10].id
    assert cursor
    assert not cursor.startswith("rly.")
    path = f"/threads/{thread}/runs/{run}/stream"
    with Reading(scene.relay.url + path, Last_Event_ID=cursor, Accept="text/event-stream") as reading:
        frames = reading.frames()
        headers = reading.headers
    assert [json.loads(frame.data) for frame in frames] == [part.data for part in own[11:]]
    assert all(frame.id.startswith("rly.") for frame in frames)
    assert headers["content-location"] == f"/threads/{thread}/runs/{run}"
    assert headers["location"] == path


def test_an_answer_is_resumed_at_the_location_it_names(scene: Scene, thread: str) -> None:
    body = {"assistant_id": "agent", "input": {"messages": [{"role": "user", "content": "hello"}]}}
    body |= {"stream_mode": MODES, "if_not_exists": "create"}
    with Reading(
        f"{scene.relay.url}/threads/{thread}/runs/stream",
        "POST",
        json.dumps(body).encode(),
        Content_Type="application/json",
    ) as reading:
        assert reading.headers["relay-stream"] == thread
        begun = reading.take(7)
        location = reading.headers["location"]
    with Reading(scene.relay.url + location, Last_Event_ID=begun[-1].id) as reading:
        rest = reading.frames()
    letters = [json.loads(frame.data)[0]["content"] for frame in [*begun, *rest] if frame.event == "messages"]
    assert "".join(letters) == ANSWER
    request = urllib.request.Request(scene.relay.url + location, headers={"Last-Event-ID": rest[-1].id})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 204
    assert len(scene.runs(thread)) == 1
