"""Which dialect an answer speaks: named, told by the request's path, or read off its first event."""

from __future__ import annotations

from relay.dialects.base import Dialect
from relay.dialects.openai_chat import OpenAIChat, is_chunk
from relay.dialects.raw import Raw
from relay.frame import Event
from relay.lifecycle import Ending

RAW = Raw()
OPENAI_CHAT = OpenAIChat()

BY_NAME: dict[str, Dialect] = {dialect.name: dialect for dialect in (RAW, OPENAI_CHAT)}


def by_path(path: str) -> Dialect | None:
    """The dialect a well-known path stands for. It sees what a first event cannot show: an error that
    comes before any chunk."""
    return OPENAI_CHAT if path.endswith("/chat/completions") else None


def by_first_event(event: Event) -> Dialect:
    """The dialect of a stream that begins with this event; `raw` when it is not recognised."""
    return OPENAI_CHAT if is_chunk(event) else RAW


def error_events(ending: Ending) -> dict[str, Event]:
    """What each dialect that has a way to say so says of an answer that ended thus, by the dialect's name."""
    said = ((name, dialect.error_event(ending)) for name, dialect in BY_NAME.items())
    return {name: event for name, event in said if event is not None}
