"""What the command line asks of a running relay, and how it is printed. `token` is one, or a key, where relay
asks for it."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from relay.client import Frame, Producer, Unreachable, cancel, get, subscribe
from relay.errors import InvalidEvent, RelayError, RunEnded
from relay.limits import check_stream_name
from relay.progress import Progress, size

LINE_MAX_BYTES = 8 * 1024 * 1024
READ_BYTES = 64 * 1024


class Refused(RelayError):
    """A relay could not be asked, or said no."""

    code, title = "refused", "Refused"


async def list_streams(url: str, echo: Callable[[str], Any], token: str = "") -> None:
    """Print one line a stream: name, frames' last id, state."""
    route = f"{url.rstrip('/')}/relay/v1/streams"
    after = ""
    while True:
        with _saying_why():
            page = await get(route, {"after": after}, give_up_s=0, token=token)
        for stream in page["streams"]:
            state = "sealed" if stream["sealed"] else "idle"
            if stream["open_runs"]:
                state = f"running {','.join(stream['open_runs'])}"
            columns = (stream["stream"], stream["top"], f"{stream['runs']} runs", state, stream["active"])
            echo("\t".join(columns))
        if not page["more"]:
            return
        after = page["after"]


async def tail_stream(
    url: str,
    stream: str,
    after: str,
    run: str | None,
    wait_s: float,
    as_json: bool,
    echo: Callable[[str], Any],
    token: str = "",
    progress: Progress | None = None,
) -> None:
    """Print a stream's frames, one line each, until it ends; comes back after a cut, or a restart of relay,
    from its cursor. A replay says in `progress` how much of it is left. Raises `Refused` when relay cannot be
    reached at first, or does not serve the stream."""
    check_stream_name(stream)
    progress = progress or Progress(sys.stderr)
    top = 0
    frames = subscribe(
        url, stream, after=after, run=run, wait_s=wait_s, control="events", give_up_s=math.inf, token=token
    )
    async with contextlib.aclosing(frames):
        with _saying_why():
            async for frame in frames:
                if frame.control is not None:
                    top = _replayed_up_to(frame.control, top)
                progress.clear()
                _print(frame, as_json, echo)
                behind = top - int(frame.id.partition("-")[0] or top)
                if behind > 0:
                    progress.show(f"{behind} frames behind")
                if frame.control is not None and frame.control.get("reason") == "deleted":
                    return


def _replayed_up_to(control: dict[str, Any], top: int) -> int:
    """Up to which seq there is something to catch up with; 0 when that is done."""
    match control["type"]:
        case "hello":
            return int(str(control["top"]).partition("-")[0])
        case "live" | "bye":
            return 0
    return top


async def show(
    url: str, stream: str, run: str | None, transcript: bool, echo: Callable[[str], Any], token: str = ""
) -> None:
    """Print what relay knows of a stream and its runs, or of one run, or a run's transcript, as JSON."""
    route = f"{url.rstrip('/')}/relay/v1/streams/{check_stream_name(stream)}"
    with _saying_why():
        if run is None:
            found = await get(route, give_up_s=0, token=token)
            found["runs"] = []
            page: dict[str, Any] = {"more": True, "after": ""}
            while page["more"]:
                page = await get(f"{route}/runs", {"after": page["after"]}, give_up_s=0, token=token)
                found["runs"] += page["runs"]
        else:
            suffix = "/transcript" if transcript else ""
            found = await get(f"{route}/runs/{quote(run, safe='')}{suffix}", give_up_s=0, token=token)
    echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())


async def cancel_run(
    url: str, stream: str, run: str | None, echo: Callable[[str], Any], token: str = ""
) -> None:
    """Cancel a run, or the current one of a stream, and print how it ended."""
    check_stream_name(stream)
    with _saying_why():
        ended = await cancel(url, stream, run, give_up_s=0, token=token)
    if ended["run"] is None:
        echo("no run is open")
    else:
        echo(f"{ended['run']}\t{ended['status']}\t{ended['reason']}")


@dataclass(frozen=True)
class PushOptions:
    """How input becomes a run. `form` is `lines`, `text` (as it comes) or `ndjson` (objects with `data` and
    perhaps `event`); `event` names the events of the first two. `opening` is what is asked of the run."""

    form: str
    event: str
    opening: dict[str, Any]


async def push_run(
    url: str,
    stream: str,
    read: Callable[[int], bytes],
    options: PushOptions,
    echo: Callable[[str], Any],
    token: str = "",
    progress: Progress | None = None,
) -> None:
    """Make one run of everything that `read` gives until it gives nothing, and complete it. Frames are
    numbered, so that requests are made again until relay has taken them, and a run that has a name can be
    pushed again from the beginning. `progress` says how much was given so far. Raises `Refused` when relay
    does not take the run or ends it; a run that breaks off here ends `failed`."""
    check_stream_name(stream)
    is_text = options.form == "text"
    # Lines are the same each time, so that those which are there already are dropped; pieces of text are not.
    producer = Producer(url, stream, from_first=not is_text, token=token, **options.opening)
    opened = False
    with _saying_why(producer.run):
        try:
            async with producer:
                opened = True
                echo(producer.run)
                if is_text and producer.next_seq > 1:
                    raise Refused(
                        "A run of text cannot be pushed again: its pieces are not the same each time."
                    )
                await _push(producer, read, options, progress or Progress(sys.stderr))
        except RunEnded as ended:
            if opened or ended.extra["run_status"] != "completed":
                raise
            echo(producer.run)  # it has everything


async def _push(
    producer: Producer, read: Callable[[int], bytes], options: PushOptions, progress: Progress
) -> None:
    """Send what is read as soon as it is there."""
    cut = _pieces if options.form == "text" else _lines_of
    first, given = producer.next_seq, 0
    try:
        async for texts in cut(_chunks(read)):
            for text in texts:
                if options.form != "ndjson":
                    await producer.send(text, options.event)
                elif text.strip():
                    with _saying_why(producer.run):  # which becomes the error of the run, too
                        data, event = _data_and_event(text)
                        await producer.send(data, event)
                given += len(text)
                progress.show(f"{producer.next_seq - first} frames, {size(given)}")
    finally:
        progress.clear()


@contextlib.contextmanager
def _saying_why(run: str = "") -> Iterator[None]:
    """Errors as the command line says them: `Refused`, with one line for a person."""
    try:
        yield
    except Refused:
        raise
    except RunEnded as error:
        status, reason = error.extra["run_status"], error.extra["reason"]
        raise Refused(f"The run {run!r} has ended: {status}, {reason}.") from None
    except Unreachable as error:
        raise Refused(error.detail) from None
    except RelayError as error:
        raise Refused(f"{error.title}. {error.detail}".strip()) from None


def _print(frame: Frame, as_json: bool, echo: Callable[[str], Any]) -> None:
    if as_json:
        unsaid = {name: None for name in ("id", "run", "at") if not getattr(frame, name)}
        echo(orjson.dumps(frame._asdict() | unsaid).decode())
    else:
        echo(f"{frame.id or '-'}\t{frame.event}\t{frame.data}")


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[str]]:
    """Text as it comes, whole characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    async for data in chunks:
        if text := decoder.decode(data):
            yield [text]
    if text := decoder.decode(b"", final=True):
        yield [text]


async def _lines_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[str]]:
    """Lines, without LF or CRLF; the last one needs no end."""
    partial = bytearray()
    async for data in chunks:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(partial) + lines[0]
            partial.clear()
        partial += rest
        yield [_line(line) for line in lines]
        if len(partial) > LINE_MAX_BYTES:
            raise Refused(f"A line is longer than {LINE_MAX_BYTES} bytes.")
    yield [_line(bytes(partial))] if partial else []


def _line(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")


def _data_and_event(text: str) -> tuple[Any, str]:
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise Refused(f"Not a JSON object: {text[:80]!r}")
    event = given.get("event", "")
    if not isinstance(event, str):
        raise InvalidEvent("'event' is a string.")
    return given.get("data"), event


async def _chunks(read: Callable[[int], bytes]) -> AsyncIterator[bytes]:
    """What is read until nothing comes, by a thread that reads one chunk ahead. Raises `Refused`."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | OSError] = asyncio.Queue()
    room = threading.Semaphore()

    def read_all() -> None:
        data: bytes | OSError = b" "
        while isinstance(data, bytes) and data:
            room.acquire()
            try:
                data = read(READ_BYTES)
            except OSError as error:
                data = error
            try:
                loop.call_soon_threadsafe(queue.put_nowait, data)
            except RuntimeError:
                return  # the loop is closed: nobody wants it any more

    # A daemon: it may wait for input for ever.
    threading.Thread(target=read_all, name="relay-push-input", daemon=True).start()
    while True:
        data = await queue.get()
        if isinstance(data, OSError):
            raise Refused(f"The input cannot be read: {data.strerror or data}.")
        if not data:
            return
        room.release()
        yield data
