"""What the command line asks of a running relay."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from relay.errors import RelayError
from relay.limits import check_stream_name
from relay.ndjson import NDJSON

RECONNECT_S = 1.0

RETRY_S = 0.25
RETRY_MAX_S = 5.0
"""Pause before a request that relay could not take is made again; doubled up to the second one."""

GIVE_UP_S = 300.0
"""How long a pushed run waits for a relay that went away."""

HEARTBEAT_S = 20
"""How long one heartbeat waits to hear that the run is over."""

BATCH_MAX_FRAMES = 1000
BATCH_MAX_BYTES = 1024 * 1024
LINE_MAX_BYTES = 8 * 1024 * 1024
READ_BYTES = 64 * 1024

_ANSWERED = aiohttp.ClientTimeout(total=120)
"""Longest wait for one answer: relay itself waits so long for a journal that is away, and less."""


class Refused(RelayError):
    """A relay could not be asked, or said no."""

    code, title = "refused", "Refused"


async def list_streams(url: str, echo: Callable[[str], Any]) -> None:
    """Print one line a stream: name, frames' last id, state."""
    async with _session() as session:
        after = ""
        while True:
            page = await _get_json(session, f"{url.rstrip('/')}/relay/v1/streams", {"after": after})
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
) -> None:
    """Print a stream's frames, one line each, until it ends; comes back after a cut, or a restart of relay,
    from its cursor. Raises `Refused` when relay cannot be reached at first, or does not serve the stream."""
    check_stream_name(stream)
    route = f"{_stream_route(url, stream)}/events"
    params = {"after": after, "wait": f"{wait_s:g}"} | ({} if run is None else {"run": run})
    headers = {"Accept": NDJSON}
    reached = False
    async with _session() as session:
        while True:
            try:
                async with session.get(route, params=params, headers=headers) as response:
                    reached = True
                    if response.status == 204:
                        return
                    await _raise_for(response)
                    async for line in _lines(response):
                        frame = orjson.loads(line)
                        if frame["id"] is not None:
                            headers["Last-Event-ID"] = frame["id"]
                        goodbye = _goodbye(frame)
                        if goodbye == "not_yet":
                            raise Refused(f"The stream {stream!r} was not created in time.")
                        _print(frame, as_json, echo)
                        if goodbye in ("ended", "deleted"):
                            return
            except BrokenPipeError:
                raise  # who reads our lines is gone, not relay
            except (aiohttp.ClientError, OSError) as error:
                if not reached or isinstance(error, aiohttp.InvalidURL):
                    raise _unreachable(url, error) from None
                # Cut: the cursor says where to go on.
            await asyncio.sleep(RECONNECT_S)


async def show(url: str, stream: str, run: str | None, transcript: bool, echo: Callable[[str], Any]) -> None:
    """Print what relay knows of a stream and its runs, or of one run, or a run's transcript, as JSON."""
    check_stream_name(stream)
    route = _stream_route(url, stream)
    async with _session() as session:
        if run is None:
            found = await _get_json(session, route, {})
            found["runs"] = []
            page: dict[str, Any] = {"more": True, "after": ""}
            while page["more"]:
                page = await _get_json(session, f"{route}/runs", {"after": page["after"]})
                found["runs"] += page["runs"]
        else:
            suffix = "/transcript" if transcript else ""
            found = await _get_json(session, f"{route}/runs/{quote(run, safe='')}{suffix}", {})
    echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())


async def cancel_run(url: str, stream: str, run: str | None, echo: Callable[[str], Any]) -> None:
    """Cancel a run, or the current one of a stream, and print how it ended."""
    check_stream_name(stream)
    route = _stream_route(url, stream)
    route += "/cancel" if run is None else f"/runs/{quote(run, safe='')}/cancel"
    async with _session() as session:
        try:
            async with session.post(route) as response:
                await _raise_for(response)
                ended = await response.json(loads=orjson.loads)
        except (aiohttp.ClientError, aiohttp.InvalidURL) as error:
            raise _unreachable(url, error) from None
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
) -> None:
    """Make one run of everything that `read` gives until it gives nothing, and complete it. Frames are
    numbered, so that requests are made again until relay has taken them, and a run that has a name can be
    pushed again from the beginning. Raises `Refused` when relay does not take the run or ends it; a run that
    breaks off here ends `failed`."""
    check_stream_name(stream)
    async with _session() as session:
        producer = _Producer(session, url, stream, options)
        await producer.open()
        echo(producer.run)
        if producer.completed:
            return
        watching = asyncio.create_task(producer.watch())
        pushing = asyncio.create_task(producer.push(_events(read, options)))
        try:
            await asyncio.wait((watching, pushing), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()  # raises: the run is over, or cannot be reached
            await pushing
        except BaseException as error:
            await _cancelled(watching, pushing)
            if not isinstance(error, _Over):
                broken_off = isinstance(error, asyncio.CancelledError)
                await producer.fail("relay push was interrupted." if broken_off else str(error))
            raise
        finally:
            await _cancelled(watching, pushing)


class _Over(Refused):
    """The run is over, or another producer's."""


class _NotNow(Refused):
    """A refusal that time may change."""


class _Producer:
    """One pushed run."""

    def __init__(self, session: aiohttp.ClientSession, url: str, stream: str, options: PushOptions) -> None:
        self.run = options.opening.get("run") or secrets.token_hex(12)
        self.completed = False
        self._session = session
        self._url = url
        self._runs = f"{_stream_route(url, stream)}/runs"
        self._run = f"{self._runs}/{quote(self.run, safe='')}"
        self._options = options
        self._writer = ""
        self._next_seq = 1

    async def open(self) -> None:
        """Open the run. One that is there already gets from us what it does not have; one that has completed
        has everything."""
        opened = await self._post(self._runs, {}, json=self._options.opening | {"run": self.run})
        if "writer" not in opened:
            self.completed = opened["status"] == "completed"
            if not self.completed:
                raise self._over(opened)
            return
        self._writer = opened["writer"]
        if self._options.form == "text" and opened["next_seq"] > 1:
            error = "A run of text cannot be pushed again: its pieces are not the same each time."
            await self.fail(error)
            raise Refused(error)

    async def push(self, batches: AsyncIterator[list[dict[str, Any]]]) -> None:
        """Append every batch, then complete the run."""
        async for batch in batches:
            await self._append(batch, {})
        await self._append([], {"end": "completed"})

    async def watch(self) -> None:
        """Keep the run from its idle timeout; raises `Refused` when it is over."""
        while True:
            state = await self._post(f"{self._run}/heartbeat", {"wait": str(HEARTBEAT_S)})
            if state["status"] == "completed":
                return
            if state["status"] != "open":
                raise self._over(state)

    async def fail(self, error: str) -> None:
        """End the run as one that its producer broke off. Asked once."""
        body = {"status": "failed", "error": error}
        with contextlib.suppress(aiohttp.ClientError, OSError, Refused):
            await self._post_once(f"{self._run}/end", {}, json=body)

    async def _append(self, frames: list[dict[str, Any]], params: dict[str, str]) -> None:
        headers = {"Relay-Seq": str(self._next_seq)}
        await self._post(f"{self._run}/frames", params, json=frames, headers=headers)
        self._next_seq += len(frames)

    async def _post(self, route: str, params: dict[str, str], **request: Any) -> Any:
        """Ask until there is an answer."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + (GIVE_UP_S if self._writer else 0)
        pause_s = RETRY_S
        while True:
            try:
                return await self._post_once(route, params, **request)
            except (aiohttp.ClientError, OSError, _NotNow) as error:
                if loop.time() >= give_up_at or isinstance(error, aiohttp.InvalidURL):
                    raise error if isinstance(error, _NotNow) else _unreachable(self._url, error) from None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def _post_once(self, route: str, params: dict[str, str], **request: Any) -> Any:
        headers = ({"Relay-Writer": self._writer} if self._writer else {}) | request.pop("headers", {})
        async with self._session.post(
            route, params=params, headers=headers, timeout=_ANSWERED, **request
        ) as response:
            try:
                await _raise_for(response)
            except Refused as refused:
                if response.status == 503:
                    raise _NotNow(refused.detail) from None
                problem = refused.extra
                if problem.get("code") == "run_ended":
                    raise self._over({"status": problem["run_status"], "reason": problem["reason"]}) from None
                if problem.get("code") in ("fenced", "unknown_run", "unknown_stream"):
                    raise _Over(refused.detail) from None
                raise
            return await response.json(loads=orjson.loads)

    def _over(self, state: dict[str, Any]) -> _Over:
        return _Over(f"The run {self.run!r} has ended: {state['status']}, {state['reason']}.")


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _events(read: Callable[[int], bytes], options: PushOptions) -> AsyncIterator[list[dict[str, Any]]]:
    """What is read, as batches of events: everything that is there, as soon as it is there."""
    cut = _pieces if options.form == "text" else _lines_of
    async for texts in cut(_chunks(read)):
        if options.form == "ndjson":
            texts = [text for text in texts if text.strip()]
        for batch in _batches([_event(text, options) for text in texts]):
            yield batch


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


def _event(text: str, options: PushOptions) -> dict[str, Any]:
    if options.form != "ndjson":
        return {"event": options.event, "data": text}
    try:
        event = orjson.loads(text)
    except orjson.JSONDecodeError:
        event = None
    if not isinstance(event, dict):
        raise Refused(f"Not a JSON object: {text[:80]!r}")
    return event


def _batches(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    batches: list[list[dict[str, Any]]] = []
    size = BATCH_MAX_BYTES
    for event in events:
        if size >= BATCH_MAX_BYTES or len(batches[-1]) >= BATCH_MAX_FRAMES:
            batches.append([])
            size = 0
        batches[-1].append(event)
        size += len(str(event.get("data", "")))
    return batches


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


def _stream_route(url: str, stream: str) -> str:
    return f"{url.rstrip('/')}/relay/v1/streams/{quote(stream, safe='')}"


def _unreachable(url: str, error: Exception) -> Refused:
    if isinstance(error, aiohttp.InvalidURL):
        return Refused(f"{url.partition('/relay/')[0]!r} is not a URL, such as http://127.0.0.1:8080.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Refused(f"Nothing answers at {url.partition('/relay/')[0]}.")
    return Refused(f"Cannot reach {url}: {error}")


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20)


async def _lines(response: aiohttp.ClientResponse) -> Any:
    partial = b""
    async for data in response.content.iter_any():
        *lines, partial = (partial + data).split(b"\n")
        for line in lines:
            if line:
                yield line


def _goodbye(frame: dict[str, Any]) -> str | None:
    """Why relay closes, if this is where it says so."""
    if frame["event"] != "relay" or frame["run"] is not None:
        return None
    notice: dict[str, str] = orjson.loads(frame["data"])
    return notice["reason"] if notice["type"] == "bye" else None


def _print(frame: dict[str, Any], as_json: bool, echo: Callable[[str], Any]) -> None:
    if as_json:
        echo(orjson.dumps(frame).decode())
    else:
        echo(f"{frame['id'] or '-'}\t{frame['event']}\t{frame['data']}")


async def _get_json(session: aiohttp.ClientSession, url: str, params: dict[str, str]) -> Any:
    try:
        async with session.get(url, params=params) as response:
            await _raise_for(response)
            return await response.json(loads=orjson.loads)
    except (aiohttp.ClientError, aiohttp.InvalidURL) as error:
        raise _unreachable(url, error) from None


async def _raise_for(response: aiohttp.ClientResponse) -> None:
    if response.status in (200, 201):
        return
    body = await response.read()
    try:
        problem = orjson.loads(body)
        said = f"{problem['title']}. {problem.get('detail', '')}".strip()
        codes = {name: problem[name] for name in ("code", "run_status", "reason") if name in problem}
        raise Refused(said, **codes)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Refused(f"The answer was {response.status} and not one of relay's.") from None
