"""Headers of HTTP messages: pairs of a name in lower case and a value, as they were sent."""

from __future__ import annotations

from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1, and what proxies have called hop-by-hop since RFC 2616.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


def all_of(headers: Headers, name: bytes) -> list[str]:
    """A header's values as text, one for each time it was sent."""
    return [value.decode("latin-1").strip() for key, value in headers if key == name]


def first_of(headers: Headers, name: bytes) -> str:
    """A header's first value as text, or ""."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1").strip()
    return ""


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *drop: bytes) -> Headers:
    """Headers without the hop-by-hop ones, those that `Connection` names, and `drop`. Names in lower case."""
    kept = [(name.lower(), value) for name, value in headers]
    dropped = _HOP_BY_HOP.union(drop)
    for name, value in kept:
        if name == b"connection":
            dropped = dropped.union(token.strip().lower() for token in value.split(b","))
    return [(name, value) for name, value in kept if name not in dropped]
