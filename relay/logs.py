"""The log: lines for people, or JSON objects for what collects logs.

What a line is about stands in its message as `name=%s`, as in `log.info("run ended stream=%s", stream)`.
In a line for people that is all there is to it; in JSON each becomes a member of its own, with its own type,
and the message is what is left: "run ended". Payloads, credentials and URLs with secrets are never logged.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import orjson

from relay.frame import timestamp
from relay.trace import TRACE_ID

FORMATS = ("auto", "json", "text")

_PLACEHOLDER = re.compile(r"(?:(?P<name>[a-z_]+)=)?%(?:%|[-#0-9.]*(?P<kind>[a-z]))")

# What could end a line, or speak to a terminal. A traceback, which has many lines, is not of the message.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))}


def set_up(wanted: str, level: int = logging.INFO, worker: int | None = None) -> bool:
    """Log to standard error in one of `FORMATS`: `auto` is for people where that is a terminal. `worker` is
    the number of this process among several. Whether lines are JSON."""
    is_json = wanted == "json" or (wanted == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(worker) if is_json else TextLines(worker))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return is_json


def json_line(logger: logging.Logger, message: str, *arguments: Any) -> str:
    """A line as `JsonLines` makes it, for who writes it himself."""
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, arguments, None)
    return JsonLines().format(record)


class TextLines(logging.Formatter):
    """`<time> <level> <logger> <message>`."""

    def __init__(self, worker: int | None = None) -> None:
        about = "" if worker is None else f"worker={worker} "
        super().__init__(f"%(asctime)s %(levelname)s %(name)s {about}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        line = super().formatMessage(record).translate(_CONTROLS)
        trace_id = TRACE_ID.get()
        return f"{line} trace_id={trace_id}" if trace_id else line


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", …}`, one object a line."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._about = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """The members that the message names, and `trace_id`, `exception` where there is one."""
        message, members = taken_apart(record)
        document: dict[str, Any] = {
            "time": timestamp(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        document = members | document | self._about
        trace_id = TRACE_ID.get()
        if trace_id:
            document["trace_id"] = trace_id
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(document, default=str).decode()


def taken_apart(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """What a record says without its named values, and those. Values of None are left out."""
    arguments = record.args
    if not arguments or not isinstance(record.msg, str) or not isinstance(arguments, tuple):
        return record.getMessage(), {}
    members: dict[str, Any] = {}
    left: list[Any] = []
    values = iter(arguments)

    def take(found: re.Match[str]) -> str:
        if found["kind"] is None:  # %%
            return found[0]
        value = next(values)
        if found["name"] is None:
            left.append(value)
            return found[0]
        if value is not None:
            members[found["name"]] = _member(found[0].partition("=")[2], value)
        return ""

    message = _PLACEHOLDER.sub(take, record.msg) % tuple(left)
    return re.sub(r" +([:,]|$)", r"\1", message).strip(" "), members


def _member(placeholder: str, value: Any) -> Any:
    if isinstance(value, float):
        return float(placeholder % value) if placeholder[-1] in "fg" else value
    if isinstance(value, bool | int | str):
        return value
    return str(value)
