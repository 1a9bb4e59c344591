"""Unmodified SDKs with relay as their base URL: a whole answer passes, and one that broke off raises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import langgraph_sdk
import openai
import pytest
from ag_ui.core import Event as AGUIEvent
from pydantic import TypeAdapter
from recorded_answers import AG_UI, ANTHROPIC, LANGGRAPH, OPENAI_RESPONSES, Answer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

from relay.dialects.detect import BY_NAME
from relay.lifecycle import Reason, ending

Texts = Iterator[str]


def responses_created(url: str, headers: dict[str, str]) -> Texts:
    with openai.OpenAI(
        base_url=url + "/v1", api_key="k", max_retries=0, default_headers=headers
    ) as client, client.responses.create(model="m", input="hello", stream=True) as stream:  # fmt: skip
        for event in stream:
            if event.type == "response.output_text.delta":
                yield event.delta


def responses_streamed(url: str, headers: dict[str, str]) -> Texts:
    with openai.OpenAI(
        base_url=url + "/v1", api_key="k", max_retries=0, default_headers=headers
    ) as client, client.responses.stream(model="m", input="hello") as stream:  # fmt: skip
        for event in stream:
            if event.type == "response.output_text.delta":
                yield event.delta
        assert stream.get_final_response().output_text == "Hello"


def messages_created(url: str, headers: dict[str, str]) -> Texts:
    with anthropic.Anthropic(
        base_url=url, api_key="k", max_retries=0, default_headers=headers
    ) as client, client.messages.create(
        model="m", max_tokens=9, messages=[{"role": "user", "content": "hello"}], stream=True
    ) as stream:  # fmt: skip
        for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                yield event.delta.text


def messages_streamed(url: str, headers: dict[str, str]) -> Texts:
    with anthropic.Anthropic(
        base_url=url, api_key="k", max_retries=0, default_headers=headers
    ) as client, client.messages.stream(
        model="m", max_tokens=9, messages=[{"role": "user", "content": "hello"}]
    ) as stream:  # fmt: skip
        yield from stream.text_stream
        assert stream.get_final_message().stop_reason == "tool_use"


def script(upstream: ScriptedUpstream, name: str, answer: Answer, events: list[bytes], broken: bool) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", *answer.headers)
        for event in events:
            await exchange.chunk(event)
        if broken:
            await exchange.send(b"fff\r\ndata: {")
            exchange.writer.close()
        else:
            await exchange.end()

    upstream.on(f"/{name}{answer.path}", handler)


@pytest.fixture(scope="module")
def beating(
    journal_url: str, upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RelayProcess]:
    """A relay that sends heartbeats all the time."""
    if journal_url.startswith("sqlite"):
        journal_url = f"sqlite:///{tmp_path_factory.mktemp('sdks') / 'relay.db'}"
    with RelayProcess.start(journal=journal_url, upstream=upstream.url, heartbeat_s=0.05) as process:
        yield process


CALLS = [
    pytest.param(responses_created, OPENAI_RESPONSES, openai.APIError, id="responses.create"),
    pytest.param(responses_streamed, OPENAI_RESPONSES, openai.APIError, id="responses.stream"),
    pytest.param(messages_created, ANTHROPIC, anthropic.APIStatusError, id="messages.create"),
    pytest.param(messages_streamed, ANTHROPIC, anthropic.APIStatusError, id="messages.stream"),
]


@pytest.mark.parametrize(("call", "answer", "error"), CALLS)
def test_a_whole_answer_passes(
    beating: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    call: Callable[..., Texts],
    answer: Answer,
    error: type[Exception],
) -> None:
    script(upstream, name, answer, answer.events, False)
    texts = list(call(f"{beating.url}/{name}", {"Relay-Stream": name}))
    assert texts == ["Hel", "lo"]
    assert whole_run(beating, name).outcome == ("completed", "upstream_end")


@pytest.mark.parametrize("broken", [False, True], ids=["ends early", "breaks"])
@pytest.mark.parametrize(("call", "answer", "error"), CALLS)
def test_an_answer_that_broke_off_raises(
    beating: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    call: Callable[..., Texts],
    answer: Answer,
    error: type[Exception],
    broken: bool,
) -> None:
    script(upstream, name, answer, answer.events[: answer.shown], broken)
    texts: list[str] = []
    with pytest.raises(error) as raised:
        texts.extend(call(f"{beating.url}/{name}", {"Relay-Stream": name}))
    assert texts == ["Hel"]
    assert whole_run(beating, name).ended["error"] in str(raised.value)


@pytest.mark.parametrize(("call", "answer", "error"), CALLS)
def test_upstreams_own_error_reaches_the_sdk_as_upstream_sent_it(
    beating: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    call: Callable[..., Texts],
    answer: Answer,
    error: type[Exception],
) -> None:
    nested = answer.error
    if answer is OPENAI_RESPONSES:  # as the API sends it, and the SDK looks for it
        nested = b'event: error\ndata: {"type":"error","error":{"message":"boom","code":"x"}}\n\n'
    script(upstream, name, answer, [*answer.events[: answer.shown], nested], False)
    with pytest.raises(error, match="boom"):
        list(call(f"{beating.url}/{name}", {"Relay-Stream": name}))
    assert whole_run(beating, name).outcome == ("failed", "upstream_error")


def graph_parts(url: str, name: str) -> list[Any]:
    with langgraph_sdk.get_sync_client(url=f"{url}/{name}", headers={"Relay-Stream": name}) as client:
        return list(client.runs.stream("th1", "agent", input={}, stream_mode=["values", "messages"]))


def test_langgraphs_client_reads_a_run_to_its_end(
    beating: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    script(upstream, name, LANGGRAPH, LANGGRAPH.events, False)
    parts = graph_parts(beating.url, name)
    assert [part.event for part in parts][:2] == ["metadata", "values"]
    assert parts[-1].event == "end"
    assert whole_run(beating, name).outcome == ("completed", "upstream_end")


def test_langgraphs_client_is_given_the_error_of_a_run_that_broke_off(
    beating: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    script(upstream, name, LANGGRAPH, LANGGRAPH.events[: LANGGRAPH.shown], True)
    last = graph_parts(beating.url, name)[-1]
    assert last.event == "error"
    assert last.data == {
        "error": "upstream_truncated",
        "message": whole_run(beating, name).ended["error"],
    }


def test_the_types_of_ag_ui_take_the_error_event_and_the_recorded_answer() -> None:
    said = BY_NAME["ag-ui"].error_event(ending(Reason.UPSTREAM_TRUNCATED))
    assert said is not None
    sent = [json.loads(event.removeprefix(b"data: ")) for event in AG_UI.events]
    events: TypeAdapter[Any] = TypeAdapter(AGUIEvent)
    kinds = [events.validate_python(payload).type for payload in [*sent, json.loads(said.data)]]
    assert kinds == [payload["type"] for payload in sent] + ["RUN_ERROR"]
