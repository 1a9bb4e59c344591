"""Which dialect an answer speaks: named, told by its head or the request's path, or read off its first
event."""

from __future__ import annotations

import re
from collections.abc import Callable

from relay.dialects import ag_ui, ai_sdk, anthropic, langgraph, openai_chat, openai_responses
from relay.dialects.base import Dialect
from relay.dialects.raw import Raw
from relay.frame import Event
from relay.headers import Headers, first_of
from relay.lifecycle import Ending

RAW = Raw()
OPENAI_CHAT = openai_chat.OpenAIChat()
OPENAI_RESPONSES = openai_responses.OpenAIResponses()
ANTHROPIC = anthropic.Anthropic()
AI_SDK = ai_sdk.AISDK()
AG_UI = ag_ui.AGUI()
LANGGRAPH = langgraph.LangGraph()

_ALL: tuple[Dialect, ...] = (
    RAW, OPENAI_CHAT, OPENAI_RESPONSES, ANTHROPIC, AI_SDK, AG_UI, LANGGRAPH,
)  # fmt: skip

BY_NAME: dict[str, Dialect] = {dialect.name: dialect for dialect in _ALL}

_BY_PATH: tuple[tuple[re.Pattern[str], Dialect], ...] = (
    (re.compile(r"/chat/completions$"), OPENAI_CHAT),
    (re.compile(r"/(v1|openai)/responses$"), OPENAI_RESPONSES),
    (re.compile(r"/v1/messages$"), ANTHROPIC),
    (re.compile(r"/runs(/[^/]+)?/stream$"), LANGGRAPH),
)

_BY_FIRST_EVENT: tuple[tuple[Callable[[Event], bool], Dialect], ...] = (
    (openai_chat.is_chunk, OPENAI_CHAT),
    (openai_responses.is_response_event, OPENAI_RESPONSES),
    (anthropic.is_message_start, ANTHROPIC),
    (ai_sdk.is_start, AI_SDK),
    (ag_ui.is_run_started, AG_UI),
    (langgraph.is_metadata, LANGGRAPH),
)


def by_head(path: str, headers: Headers) -> Dialect | None:
    """The dialect that the head of an event stream, or the well-known path it answers, stands for. It
    sees what a first event cannot show: an error before any other event."""
    if first_of(headers, ai_sdk.HEADER):
        return AI_SDK
    return next((dialect for pattern, dialect in _BY_PATH if pattern.search(path)), None)


def by_first_event(event: Event) -> Dialect:
    """The dialect of a stream that begins with this event; `raw` when it is not recognised."""
    return next((dialect for is_first, dialect in _BY_FIRST_EVENT if is_first(event)), RAW)


def error_events(ending: Ending) -> dict[str, Event]:
    """What each dialect that has a way to say so says of an answer that ended thus, by the dialect's name."""
    said = ((name, dialect.error_event(ending)) for name, dialect in BY_NAME.items())
    return {name: event for name, event in said if event is not None}
