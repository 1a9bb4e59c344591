"""Which stream a proxied request belongs to, as far as the request itself tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson

from relay.errors import StartupError
from relay.headers import Headers, first_of

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 section 5.6.2
_PATH_WORD = re.compile(r"\{stream\}")
_METHOD = re.compile(r"[A-Z]+", re.ASCII)


Rule = Callable[[str, Headers, Any], str]
"""Finds a stream's name, or "", in a raw path, a way to a header's value, and a parsed JSON body."""


class NamingRules(NamedTuple):
    """The `--stream-from` settings, in their order: the first that finds a name wins."""

    rules: Sequence[Rule]
    needs_body: bool

    def find(self, raw_path: str, headers: Headers, body: Any) -> str:
        """The stream's name, or "". `body` is the parsed JSON or None. What is found may not be a
        valid name."""
        for rule in self.rules:
            name = rule(raw_path, headers, body)
            if name:
                return name
        return ""


def naming_rules(settings: Sequence[str]) -> NamingRules:
    """Read `path:/chat/{stream}`, `body:/json/pointer` and `header:Name`; raises `StartupError`."""
    rules: list[Rule] = []
    needs_body = False
    for setting in settings:
        kind, _, rest = setting.partition(":")
        if kind == "path" and _is_path(rest):
            rules.append(_path_rule(rest))
        elif kind == "body" and rest.startswith("/"):
            rules.append(_body_rule(rest))
            needs_body = True
        elif kind == "header" and _HEADER_NAME.fullmatch(rest):
            rules.append(_header_rule(rest))
        else:
            raise StartupError(
                f"--stream-from {setting!r} is not path:/chat/{{stream}}, body:/json/pointer or header:Name."
            )
    return NamingRules(rules, needs_body)


Routes = Callable[[str, str], str]
"""Finds a stream's name, or "", in a method and a raw path."""


def stream_routes(flag: str, settings: Sequence[str]) -> Routes:
    """Read routes such as `GET /chat/{stream}/stream`; raises `StartupError` that names the flag."""
    routes = []
    for setting in settings:
        method, _, pattern = setting.partition(" ")
        if not _METHOD.fullmatch(method) or not _is_path(pattern):
            raise StartupError(f"{flag} {setting!r} is not a method and a path, as in GET /chat/{{stream}}.")
        routes.append((method, _path(pattern)))

    def find(method: str, raw_path: str) -> str:
        for wanted, path in routes:
            match = path.fullmatch(raw_path) if method == wanted else None
            if match:
                return unquote(match[1])
        return ""

    return find


def _is_path(pattern: str) -> bool:
    return pattern.startswith("/") and len(_PATH_WORD.findall(pattern)) == 1


def _path(pattern: str) -> re.Pattern[str]:
    before, after = _PATH_WORD.split(pattern)
    return re.compile(re.escape(before) + r"([^/]+)" + re.escape(after))


def _path_rule(pattern: str) -> Rule:
    path = _path(pattern)

    def rule(raw_path: str, headers: Headers, body: Any) -> str:
        match = path.fullmatch(raw_path)
        return unquote(match[1]) if match else ""

    return rule


def _header_rule(name: str) -> Rule:
    wanted = name.lower().encode()
    return lambda raw_path, headers, body: first_of(headers, wanted)


def _body_rule(pointer: str) -> Rule:
    # RFC 6901
    keys = [part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/")]

    def rule(raw_path: str, headers: Headers, body: Any) -> str:
        for key in keys:
            if isinstance(body, dict):
                body = body.get(key)
            elif isinstance(body, list) and key.isdigit() and int(key) < len(body):
                body = body[int(key)]
            else:
                return ""
        return body if isinstance(body, str) else str(body) if type(body) is int else ""

    return rule


def parse_json(body: bytes) -> Any:
    """The body as JSON, None when it is none: upstream is the one to complain."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
