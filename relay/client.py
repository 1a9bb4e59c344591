"""What the command line asks of a running relay."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO
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
READ_BYTES = 64 * 1024


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
                state = "sealed" if stream["sealed"] else "open"
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
    """How standard input becomes a run. `form` is `lines`, `text` (as it comes) or `ndjson` (objects with
    `data` and perhaps `event`); `event` names the events of the first two."""

    form: str
    event: str
    opening: dict[str, Any]


async def push_run(
    url: str, stream: str, source: BinaryIO, options: PushOptions, echo: Callable[[str], Any]
) -> None:
    """Make one run of everything that `source` gives until its end, and complete it. Frames are numbered, so
    that requests are made again until relay has taken them. Raises `Refused` when relay does not take the run
    or ends it; a run that breaks off here ends `failed`."""
    check_stream_name(stream)
    async with _session() as session:
        producer = _Producer(session, url, stream, options)
        await producer.open()
        echo(producer.run)
        watching = asyncio.create_task(producer.watch())
        pushing = asyncio.create_task(producer.push(_events(source, options)))
        try:
            await asyncio.wait((watching, pushing), return_when=asyncio.FIRST_COMPLETED)
            if not pushing.done():
                watching.result()  # raises: the run is over, or cannot be reached
            await pushing
        except Refused:
            raise
        except BaseException:
            with contextlib.suppress(RelayError):
                await producer.fail("relay push was interrupted")
            raise
        finally:
            watching.cancel()
            pushing.cancel()


class _Producer:
    """One pushed run."""

    def __init__(self, session: aiohttp.ClientSession, url: str, stream: str, options: PushOptions) -> None:
        self.run = options.opening.get("run") or secrets.token_hex(12)
        self._session = session
        self._url = url
        self._runs = f"{_stream_route(url, stream)}/runs"
        self._options = options
        self._writer = ""
        self._next_seq = 1

    async def open(self) -> None:
        """Open the run; the name that we choose makes it safe to ask twice."""
        opened = await self._post(self._runs, {}, json=self._options.opening | {"run": self.run})
        if "writer" not in opened:
            raise Refused(f"The run {self.run!r} has ended: {opened['status']}, {opened['reason']}.")
        self._writer, self._next_seq = opened["writer"], opened["next_seq"]

    async def push(self, batches: AsyncIterator[list[dict[str, Any]]]) -> None:
        """Append every batch, then complete the run."""
        async for batch in batches:
            await self._append(batch, {})
        await self._append([], {"end": "completed"})

    async def watch(self) -> None:
        """Keep the run from its idle timeout; raises `Refused` when it is over."""
        while True:
            state = await self._post(f"{self._runs}/{self.run}/heartbeat", {"wait": str(HEARTBEAT_S)})
            if state["status"] == "completed":
                return
            if state["status"] != "open":
                raise Refused(f"The run {self.run!r} has ended: {state['status']}, {state['reason']}.")

    async def fail(self, error: str) -> None:
        """End the run as one that its producer broke off. Asked once."""
        body = {"status": "failed", "error": error}
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await self._post_once(f"{self._runs}/{self.run}/end", {}, json=body)

    async def _append(self, frames: list[dict[str, Any]], params: dict[str, str]) -> None:
        headers = {"Relay-Seq": str(self._next_seq)}
        answer = await self._post(f"{self._runs}/{self.run}/frames", params, json=frames, headers=headers)
        self._next_seq = answer["next_seq"]

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
        headers = {"Relay-Writer": self._writer} | request.pop("headers", {})
        async with self._session.post(route, params=params, headers=headers, **request) as response:
            if response.status == 503:
                raise _NotNow("relay does not take the run now.")
            await _raise_for(response)
            return await response.json(loads=orjson.loads)


class _NotNow(Refused):
    """A refusal that time may change."""


async def _events(source: BinaryIO, options: PushOptions) -> AsyncIterator[list[dict[str, Any]]]:
    """What a source gives, as batches of events: everything that is there, as soon as it is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    partial = ""
    async for data in _chunks(source):
        text = decoder.decode(data, final=not data)
        if options.form == "text":
            texts = [text] if text else []
        else:
            *texts, partial = (partial + text).split("\n")
            if not data and partial:
                texts.append(partial)
            texts = [line.removesuffix("\r") for line in texts]
        events = [_event(text, options) for text in texts if text.strip() or options.form == "lines"]
        for batch in _batches(events):
            yield batch


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


async def _chunks(source: BinaryIO) -> AsyncIterator[bytes]:
    """What a source gives, read by a thread of its own no faster than it is taken; empty at the end."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(1)

    def read() -> None:
        data = b" "
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody wants it any more
            while data:
                data = source.read1(READ_BYTES)  # type: ignore[attr-defined]
                asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()

    threading.Thread(target=read, name="relay-push-stdin", daemon=True).start()
    while True:
        data = await queue.get()
        yield data
        if not data:
            return


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
        raise Refused(f"{problem['title']}. {problem.get('detail', '')}".strip())
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Refused(f"The answer was {response.status} and not one of relay's.") from None
