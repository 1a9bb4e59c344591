"""The matrix: which clients are tried, each in which columns, and why not where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clients import (
    anthropic_python,
    chromium,
    httpx_sse_python,
    langgraph_python,
    node_program,
    openai_python,
)
from clients.curl_program import Curl
from clients.notes import Client
from clients.relay_client import Subscribe

COLUMNS = ("plain", "cut and resume", "cancel", "truncation", "late join")


@dataclass(frozen=True)
class Row:
    """A line of the table in docs/clients.md. `package` is what its version is that of; `clients` are the
    ways it is used, by a name each; `cannot` has the reasons for columns that are not tried; `elsewhere` has
    the tests that try it where this folder does not, by column."""

    title: str
    package: str
    clients: dict[str, Client] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


_USE_CHAT = dict.fromkeys(
    ("plain", "cancel", "late join"),
    "test_an_answer_survives_a_reload_is_followed_by_a_second_tab_and_stopped_in_both",
) | {
    "cut and resume": "test_what_a_cut_connection_missed_is_shown_once",
    "truncation": "test_an_answer_that_broke_off_is_an_error_and_nothing_to_resume",
}
"""Of tests/browser/test_use_chat.py."""

_SILENT = dict.fromkeys(
    ("cancel", "truncation"),
    "Cannot, because for an `EventSource` an answer of a format that relay does not know ends like others: "
    "it comes back, gets 204 and is closed. A format with an error event tells it; so does the events route.",
)

ROWS: Sequence[Row] = (
    Row(
        "browser `EventSource`, the backend's path",
        "chromium",
        {"eventsource-chromium": chromium.EventSourceInChromium()},
        _SILENT,
    ),
    Row(
        "browser `EventSource`, the events route",
        "chromium",
        {"eventsource-chromium-events": chromium.EventSourceInChromiumOnEvents()},
    ),
    Row(
        "`relay-stream.js` in a browser",
        "chromium",
        {"relay-stream-chromium": chromium.RelayStreamInChromium()},
    ),
    Row("`relay-stream.js` in Node", "node", {"relay-stream-node": node_program.RelayStreamInNode()}),
    Row(
        "npm `eventsource`, the backend's path",
        "npm:eventsource",
        {"eventsource-node": node_program.EventSourceInNode()},
        _SILENT,
    ),
    Row(
        "npm `eventsource`, the events route",
        "npm:eventsource",
        {"eventsource-node-events": node_program.EventSourceInNodeOnEvents()},
    ),
    Row(
        "OpenAI Python, chat",
        "pypi:openai",
        {"openai-python-chat": openai_python.Chat(), "openai-python-chat-async": openai_python.AsyncChat()},
    ),
    Row(
        "OpenAI Python, responses",
        "pypi:openai",
        {
            "openai-python-responses": openai_python.Responses(),
            "openai-python-responses-stream": openai_python.ResponsesStream(),
        },
    ),
    Row("OpenAI JS, chat", "npm:openai", {"openai-js-chat": node_program.OPENAI_CHAT_IN_NODE}),
    Row("OpenAI JS, responses", "npm:openai", {"openai-js-responses": node_program.OPENAI_RESPONSES_IN_NODE}),
    Row(
        "Anthropic Python",
        "pypi:anthropic",
        {
            "anthropic-python": anthropic_python.Messages(),
            "anthropic-python-stream": anthropic_python.MessagesStream(),
        },
    ),
    Row("Anthropic JS", "npm:@anthropic-ai/sdk", {"anthropic-js": node_program.ANTHROPIC_IN_NODE}),
    Row("AI SDK `useChat`", "npm:ai", elsewhere=_USE_CHAT),
    Row("AI SDK `DefaultChatTransport`", "npm:ai-6", {"ai-sdk-transport": node_program.ChatTransport()}),
    Row("AG-UI `HttpAgent`", "npm:@ag-ui/client", {"ag-ui": node_program.AG_UI_IN_NODE}),
    Row("LangGraph Python", "pypi:langgraph-sdk", {"langgraph-python": langgraph_python.RunsStream()}),
    Row("LangGraph JS", "npm:@langchain/langgraph-sdk", {"langgraph-js": node_program.LANGGRAPH_IN_NODE}),
    Row("Python `httpx-sse`", "pypi:httpx-sse", {"httpx-sse": httpx_sse_python.Recipe()}),
    Row("`relay.client`", "relay", {"relay-client": Subscribe()}),
    Row("curl", "curl", {"curl": Curl()}),
)
