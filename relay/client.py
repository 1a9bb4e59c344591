"""What the command line asks of a running relay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from relay.errors import RelayError
from relay.limits import check_stream_name
from relay.ndjson import NDJSON

RECONNECT_S = 1.0


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
    route = f"{url.rstrip('/')}/relay/v1/streams/{quote(stream, safe='')}/events"
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
    if response.status == 200:
        return
    body = await response.read()
    try:
        problem = orjson.loads(body)
        raise Refused(f"{problem['title']}. {problem.get('detail', '')}".strip())
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Refused(f"The answer was {response.status} and not one of relay's.") from None
