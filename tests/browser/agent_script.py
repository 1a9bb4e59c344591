"""What the scripted agent says to browsers, and how it is let say it part by part."""

from __future__ import annotations

from collections.abc import Iterator

from scripted_upstream import Exchange, Gate, Handler

# Several bytes a character, so that some cuts fall inside one; several lines; an empty one.
FRAMES = [f"{n}: wörd → 🙂\n\nline of {n}; " for n in range(120)]
TEXT = "".join(FRAMES)
PARTS = 6


def event(data: str) -> bytes:
    """An unnamed event."""
    return "".join(f"data: {line}\n" for line in data.split("\n")).encode() + b"\n"


def in_parts(gate: Gate, *headers: str) -> Handler:
    """Answers with `FRAMES`; each of `PARTS` parts waits at the gate."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", *headers)
        for n, frame in enumerate(FRAMES):
            if n % (len(FRAMES) // PARTS) == 0:
                await gate.wait()
            await exchange.chunk(event(frame))
        await exchange.end()

    return handler


def text_of_parts() -> Iterator[str]:
    """The text that is out after each part."""
    for part in range(1, PARTS + 1):
        yield "".join(FRAMES[: part * len(FRAMES) // PARTS])
