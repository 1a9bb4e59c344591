"""A client of relay: `subscribe` reads a stream, `Producer` pushes a run, `cancel` and `transcript` ask once.

Errors are those of `relay.errors`, found by the `code` of relay's problem document, so that `except RunEnded`
means the same on both sides; what no class stands for is `Refused`, and no answer at all `Unreachable`.
Answers that time may change (408, 425, 429, 5xx but 501), cut connections and silence are asked again, after
`Retry-After` where there is one, with backoff and full jitter, until nothing good was heard for `give_up_s`.
Only a first request that nothing answers fails at once, because then the URL is likely wrong. `token` is a
token or a key, where relay asks for one; a `session` of your own holds it in its headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import orjson

from relay import errors
from relay.cursor import RESUME_PREFIX, parse_cursor, parse_resume_id
from relay.errors import (
    CursorGone,
    Fenced,
    InvalidEvent,
    InvalidParameter,
    RelayError,
    RunEnded,
    UnknownRun,
    UnknownStream,
)
from relay.frame import CONTROL_EVENT, check_event_name
from relay.limits import check_run_name, check_stream_name
from relay.ndjson import NDJSON

RETRY_S = 1.0
RETRY_MAX_S = 30.0
"""A pause before asking again is drawn from 0 to the first, doubled by each failure up to the second."""

GIVE_UP_S = 300.0
"""How long a relay that went away is asked again."""

SILENCE_S = 45.0
"""A connection silent for so long is dead: relay's heartbeat comes every 15 s, unless it is set otherwise."""

HEARTBEAT_S = 20
"""How long one heartbeat of a producer waits to hear that the run is over."""

BREAK_OFF_S = 10.0
"""How long a producer that breaks off tries to say so."""

BATCH_MAX_FRAMES = 1000
BATCH_MAX_BYTES = 1024 * 1024
"""What a producer holds while a request is under way; the frame that fills it is in it."""

_ANSWERED = aiohttp.ClientTimeout(total=120, sock_connect=30)
"""Longest wait for one answer: relay itself waits so long for a journal that is away, and less."""

_BY_CODE = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, RelayError)
}

_CONNECTION_CONTROLS = ("hello", "gap", "reset", "live", "bye", "heartbeat")


class Refused(RelayError):
    """relay, or what stands in its place, said no in a way that no class of `relay.errors` stands for. `code`
    is the problem document's, or `not_relay`; `status` that of the answer."""

    title = "Refused"

    def __init__(self, detail: str, *, code: str, status: int, title: str = title, **extra: Any) -> None:
        super().__init__(detail, **extra)
        self.code, self.status, self.title = code, status, title


class Unreachable(RelayError):
    """Nothing answered, or not for `give_up_s`."""

    code, status, title = "unreachable", 0, "relay cannot be reached"


# Reading


class Frame(NamedTuple):
    """One frame as it was read. `id` is the cursor behind it, `<seq>-<ms>`; `event` may be empty; `data` is
    text, as its producer gave it; `at` is when it was journaled, RFC 3339 in UTC.

    Control frames have the event `relay`. Those of the connection alone (`hello`, `gap`, `reset`, `live`,
    `bye`) carry the position they establish as `id`, perhaps "", and `run` and `at` are "".
    """

    id: str
    event: str
    data: str
    run: str
    at: str

    @property
    def control(self) -> dict[str, Any] | None:
        """What a control frame says, `{"type": …}` as PROTOCOL.md has it; None for a producer's frame."""
        if self.event != CONTROL_EVENT:
            return None
        said: dict[str, Any] = orjson.loads(self.data)
        return said


async def subscribe(
    url: str,
    stream: str,
    *,
    after: str = "start",
    run: str | None = None,
    wait_s: float = 0.0,
    control: Literal["none", "events"] = "none",
    silence_s: float = SILENCE_S,
    give_up_s: float = GIVE_UP_S,
    token: str = "",
    session: aiohttp.ClientSession | None = None,
) -> AsyncGenerator[Frame, None]:
    """Read a stream, each frame once and none skipped in silence, over any number of connections, until it
    has ended: it is sealed without an open run, or the `run` asked for has ended.

    `after` is `start`, `tail`, or the `id` of the last frame that was dealt with, also of an earlier process.
    `run` is a run's name, `current` or `latest`. `wait_s` waits for a stream that does not exist yet (60 at
    most). With `control="events"` control frames are yielded too, those of each connection among them, and
    `gap` and `reset` say that frames were lost before the next one. Without, a loss raises `CursorGone`,
    whose `extra["cursor"]` is the `after` to go on from for who takes the loss.

    Raises `UnknownStream` when there is none, when it was not created in time, or was deleted; `Unreachable`;
    and what else relay refuses. Leaving the iteration early closes the connection when the generator is
    closed: `contextlib.aclosing` does that at once.
    """
    place = _Place(after, contiguous=run is None)
    params = {"wait": f"{wait_s:g}"} | ({} if run is None else {"run": run})
    route = _stream_route(url, stream)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=silence_s + wait_s)
    async with _borrowed(session, token) as asking:
        retrying = _Retrying(url, give_up_s)
        while True:
            pause_s = None
            try:
                async with asking.get(
                    f"{route}/events", params=params | place.params, headers=place.headers, timeout=timeout
                ) as response:
                    if response.status == 204:
                        return
                    await _raise_for(response)
                    retrying.heard()
                    async for line in _lines(response):
                        frame = _frame(line)
                        said = frame.control
                        kind = said["type"] if said is not None else ""
                        if said is None or kind not in _CONNECTION_CONTROLS:
                            if place.advance(frame.id) and (said is None or control == "events"):
                                yield frame
                            continue
                        lost = kind in ("gap", "reset")
                        place.establish(frame.id, lost)
                        reason = said.get("reason", kind)
                        if kind == "bye" and reason == "not_yet":
                            raise UnknownStream(f"The stream {stream!r} was not created in time.")
                        if control == "events":
                            yield frame
                        elif lost:
                            raise CursorGone("Frames were lost.", reason=reason, cursor=frame.id)
                        if kind == "bye":
                            if reason == "ended":
                                return
                            if reason == "deleted":
                                raise UnknownStream(f"The stream {stream!r} was deleted.")
                            pause_s = said["retry_ms"] / 1000
                            break
            except (aiohttp.ClientError, OSError, _NotNow) as error:
                await retrying.pause(error)
            else:
                # relay says itself when to come back; an answer that just ends was cut.
                await asyncio.sleep(random.uniform(0, RETRY_S) if pause_s is None else pause_s)


class _Place:
    """Where a reader stands, and which frames are new to it."""

    def __init__(self, after: str, contiguous: bool) -> None:
        self.params: dict[str, str] = {}
        self.headers = {"Accept": NDJSON}
        self._contiguous = contiguous
        self._seq: int | None = None
        if after in ("start", "tail"):
            self.params["after"] = after
            return
        cursor = parse_resume_id(after).cursor if after.startswith(RESUME_PREFIX) else parse_cursor(after)
        self._stand(after, cursor.seq)

    def advance(self, cursor: str) -> bool:
        """Whether a journaled frame is new; raises `CursorGone` where frames are missing before it."""
        seq = parse_cursor(cursor).seq
        if self._seq is not None:
            if seq <= self._seq:
                return False
            if self._contiguous and seq != self._seq + 1:
                detail = f"Frames are missing between {self._seq} and {seq}."
                raise CursorGone(detail, reason="hole", cursor=self.headers["Last-Event-ID"])
        self._stand(cursor, seq)
        return True

    def establish(self, cursor: str, lost: bool) -> None:
        """Hear a connection's position. Who has one believes another only where a loss is said, so that a
        wrong one shows as a hole; of one run frames need not follow each other."""
        if cursor:
            seq = parse_cursor(cursor).seq
            if lost or self._seq is None or (not self._contiguous and seq > self._seq):
                self._stand(cursor, seq)

    def _stand(self, cursor: str, seq: int) -> None:
        self.headers["Last-Event-ID"] = cursor
        self._seq = seq


def _frame(line: bytes) -> Frame:
    members = orjson.loads(line)
    names = ("id", "event", "data", "run", "at")
    return Frame(*(members[name] or "" for name in names))


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    partial = b""
    async for data in response.content.iter_any():
        *lines, partial = (partial + data).split(b"\n")
        for line in lines:
            if line:
                yield line


# Pushing


class Producer:
    """A run that is pushed, as an async context manager: opened on entering, ended on leaving: `completed`,
    or `failed` with the exception's text.

    Frames are numbered and sent in batches, each while the next one is gathered, and again until relay has
    taken them; a repeated one is journaled once. While the producer is silent, heartbeats keep the run alive.
    When the run is over before its block is (cancelled, taken over, timed out), or relay refuses it or cannot
    be reached, the block is cancelled where it waits, and leaving it raises `RunEnded` (`extra` has
    `run_status` and `reason`), `Fenced`, or what else it was.

    `run` names the run; a name that exists is the same run, with a new writer token: `next_seq` says where to
    go on. With `from_first` the frames are given again from the first one, and those that are there already
    are dropped. `take_over` asks for the writer of a run that must exist, also of a proxied one, whose
    upstream is then closed. The other options are those of `POST …/runs`: `supersedes` is a run, several, or
    `latest`, `idle_timeout_s` seconds, `metadata` any JSON.

    Entering raises `RunEnded` when the run has ended already, `StreamBusy`, `UnknownRun`, and so on.
    """

    def __init__(
        self,
        url: str,
        stream: str,
        *,
        run: str | None = None,
        from_first: bool = False,
        take_over: bool = False,
        dialect: str | None = None,
        supersedes: str | Sequence[str] | None = None,
        if_busy: str | None = None,
        idle_timeout_s: float | None = None,
        seal: bool | None = None,
        metadata: Any = None,
        give_up_s: float = GIVE_UP_S,
        token: str = "",
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        if take_over and run is None:
            raise InvalidParameter("'take_over' needs the name of a run.", parameter="run")
        # A name of our own makes the opening repeatable.
        self.run = secrets.token_hex(12) if run is None else check_run_name(run)
        self.stream = stream
        self.next_seq = 1
        """The number of the frame that is given next, counting the run's frames from 1."""
        self._route = _stream_route(url, stream)
        self._from_first = from_first
        self._take_over = take_over
        wishes = {
            "run": self.run, "dialect": dialect, "supersedes": supersedes, "if_busy": if_busy,
            "idle_timeout_s": idle_timeout_s, "seal": seal, "metadata": metadata,
        }  # fmt: skip
        self._opening = {name: value for name, value in wishes.items() if value is not None}
        self._url = url
        self._give_up_s = give_up_s
        self._lent = session
        self._token = token
        self._stack = contextlib.AsyncExitStack()
        self._writer = ""
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._under_way = False
        self._changed = asyncio.Condition()
        self._over: Exception | None = None
        self._ended = False
        self._leaving = False
        self._interrupted = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._session = await self._stack.enter_async_context(_borrowed(self._lent, self._token))
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        self._delivering = asyncio.create_task(self._deliver())
        self._watching = asyncio.create_task(self._watch())
        self._stack.push_async_callback(_cancelled, self._delivering, self._watching)
        return self

    async def send(self, data: Any, event: str = "") -> None:
        """Give a frame: text, or any JSON but None, and an event name. Returns when it is held, which waits
        for room while a request is under way; `flush` waits for the journal. Raises `InvalidEvent`, and why
        the run is over when it is."""
        if data is None:
            raise InvalidEvent("The data of a frame cannot be null.")
        try:
            encoded = orjson.dumps({"event": check_event_name(event), "data": data})
        except TypeError as error:
            raise InvalidEvent(f"The data of a frame cannot be sent: {error}") from None
        async with self._changed:
            await self._changed.wait_for(lambda: self._over is not None or self._has_room())
            self._raise_if_over()
            self._waiting.append(encoded)
            self._waiting_bytes += len(encoded)
            self.next_seq += 1
            self._changed.notify_all()

    async def flush(self) -> None:
        """Wait until all that was given is journaled; raises why the run is over when it is before."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._over is not None or not (self._waiting or self._under_way)
            )
            self._raise_if_over()

    async def end(
        self, status: Literal["completed", "failed"] = "completed", *, reason: str = "", error: str = ""
    ) -> None:
        """Journal all that was given and end the run, before the block ends or otherwise than it would:
        `reason` may be `input_required` of a completed run, `error` is the text of a failed one."""
        await self.flush()
        self._leaving = True
        await _cancelled(self._watching)  # which would take our ending for another's
        try:
            await self._end({"status": status, "reason": reason or None, "error": error or None})
        except RunEnded as ended:
            # Of a run that is ours to write only we complete or fail: an answer of ours was lost.
            if ended.extra.get("run_status") != status:
                raise
        self._ended = True
        await self._stop(RunEnded(f"The run {self.run!r} has ended.", run_status=status, reason=reason))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving = True
        # As asyncio.timeout does it: a cancellation that somebody else asked for as well stays one.
        interrupted = (
            self._interrupted
            and self._task.uncancel() <= self._cancelling
            and isinstance(error, asyncio.CancelledError)
        )
        try:
            if error is None and not self._ended:
                try:
                    await self.end()
                except BaseException as failure:
                    await self._break_off(failure)
                    raise
            elif error is not None:
                await self._break_off(self._over if interrupted and self._over else error)
        finally:
            await self._stack.aclose()
        if interrupted and self._over is not None:
            raise self._over from None

    async def _open(self) -> None:
        if self._take_over:
            opened = await self._ask(f"{self._run_route}/writer")
        else:
            opened = await self._ask(f"{self._route}/runs", json=self._opening)
        if "writer" not in opened:
            raise self._has_ended(opened)
        self._writer = opened["writer"]
        if not self._from_first:
            self.next_seq = opened["next_seq"]

    async def _deliver(self) -> None:
        """Send what is given, a batch at a time."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(self._waiting))
                    frames, self._waiting, self._waiting_bytes = self._waiting, [], 0
                    first = self.next_seq - len(frames)
                    self._under_way = True
                    self._changed.notify_all()
                headers = {"Content-Type": "application/json", "Relay-Seq": str(first)}
                await self._ask(f"{self._run_route}/frames", headers, b"[%b]" % b",".join(frames))
                async with self._changed:
                    self._under_way = False
                    self._changed.notify_all()
        except Exception as error:  # whatever it is, the block must not wait for us in vain
            await self._stop(error)

    async def _watch(self) -> None:
        """Keep the run from its idle timeout, and hear that it is over."""
        try:
            while True:
                state = await self._ask(f"{self._run_route}/heartbeat", params={"wait": str(HEARTBEAT_S)})
                if state["status"] != "open":
                    raise self._has_ended(state)
        except Exception as error:  # whatever it is, the block must not wait for us in vain
            await self._stop(error)

    async def _stop(self, error: Exception) -> None:
        """The run is over: tell who waits, and cancel the block."""
        async with self._changed:
            if self._over is not None:
                return
            self._over = error
            self._changed.notify_all()
        if not self._leaving:
            self._interrupted = True
            self._task.cancel()

    async def _break_off(self, error: BaseException) -> None:
        """End the run as failed, if it can be said soon and is ours to say."""
        if self._ended or isinstance(self._over, RunEnded | Fenced | UnknownRun | UnknownStream):
            return
        text = str(error) or type(error).__name__
        if isinstance(error, asyncio.CancelledError):
            text = "The producer was interrupted."
        with contextlib.suppress(RelayError, TimeoutError):
            async with asyncio.timeout(BREAK_OFF_S):
                if self._over is None:
                    await self.flush()
                await self._end({"status": "failed", "error": text})

    async def _end(self, ending: dict[str, Any]) -> None:
        await self._ask(f"{self._run_route}/end", json=ending)

    async def _ask(
        self, route: str, headers: dict[str, str] | None = None, body: bytes | None = None, **request: Any
    ) -> Any:
        retrying = _Retrying(self._url, self._give_up_s, reached=bool(self._writer))
        sent = ({"Relay-Writer": self._writer} if self._writer else {}) | (headers or {})
        return await _answer(self._session, "POST", route, retrying, body, headers=sent, **request)

    @property
    def _run_route(self) -> str:
        return f"{self._route}/runs/{quote(self.run, safe='')}"

    def _has_room(self) -> bool:
        return len(self._waiting) < BATCH_MAX_FRAMES and self._waiting_bytes < BATCH_MAX_BYTES

    def _raise_if_over(self) -> None:
        if self._over is not None:
            raise self._over

    def _has_ended(self, state: dict[str, Any]) -> RunEnded:
        status, reason = state["status"], state["reason"]
        return RunEnded(
            f"The run {self.run!r} has ended: {status}, {reason}.", run_status=status, reason=reason
        )


# Asking


async def cancel(
    url: str,
    stream: str,
    run: str | None = None,
    *,
    reason: str = "",
    give_up_s: float = GIVE_UP_S,
    token: str = "",
    session: aiohttp.ClientSession | None = None,
) -> dict[str, Any]:
    """Cancel a run, or the newest open one of a stream; what it said stays. Returns the run as it ended, now
    or before: `run`, `status`, `reason` …, or `{"stream", "run": None}` when none is open. `reason` becomes
    the error text of the ending. Raises `UnknownStream`, `UnknownRun`."""
    route = _stream_route(url, stream)
    route += "/cancel" if run is None else f"/runs/{quote(run, safe='')}/cancel"
    body = {"reason": reason} if reason else {}
    async with _borrowed(session, token) as asking:
        ended: dict[str, Any] = await _answer(asking, "POST", route, _Retrying(url, give_up_s), json=body)
    return ended


async def transcript(
    url: str,
    stream: str,
    run: str = "latest",
    *,
    give_up_s: float = GIVE_UP_S,
    token: str = "",
    session: aiohttp.ClientSession | None = None,
) -> dict[str, Any]:
    """The text that was shown of a run (a name, `current` or `latest`), whatever its ending: `status`,
    `reason`, `text`, `parts`, `frames`, `truncated` … as PROTOCOL.md has it. Raises `UnknownStream`,
    `UnknownRun`."""
    route = f"{_stream_route(url, stream)}/runs/{quote(run, safe='')}/transcript"
    text: dict[str, Any] = await get(route, give_up_s=give_up_s, token=token, session=session)
    return text


async def get(
    url: str,
    params: dict[str, str] | None = None,
    *,
    give_up_s: float = GIVE_UP_S,
    token: str = "",
    session: aiohttp.ClientSession | None = None,
) -> Any:
    """What one of relay's JSON routes answers; `url` is the whole of it."""
    async with _borrowed(session, token) as asking:
        return await _answer(asking, "GET", url, _Retrying(url, give_up_s), params=params or {})


def _stream_route(url: str, stream: str) -> str:
    return f"{url.rstrip('/')}/relay/v1/streams/{quote(check_stream_name(stream), safe='')}"


@contextlib.asynccontextmanager
async def _borrowed(
    session: aiohttp.ClientSession | None, token: str
) -> AsyncIterator[aiohttp.ClientSession]:
    """The caller's session, which stays open, or one of our own."""
    if session is not None:
        if token:
            raise InvalidParameter("A session of your own has the token in its headers.", parameter="token")
        yield session
        return
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(read_bufsize=2**20, headers=headers) as own:
        yield own


class _NotNow(Exception):
    """A refusal that time may change, and when to ask again if that was said."""

    def __init__(self, error: RelayError, after_s: float | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


class _Retrying:
    """When to ask again, and when no more."""

    def __init__(self, url: str, give_up_s: float, *, reached: bool = False) -> None:
        self._url = url
        self._give_up_s = give_up_s
        self._reached = reached
        self._failures = 0
        self._heard_at = time.monotonic()

    def heard(self) -> None:
        """A good answer began."""
        self._reached = True
        self._failures = 0
        self._heard_at = time.monotonic()

    async def pause(self, error: Exception) -> None:
        """Wait until it is time to ask again; raises what the caller is told when it never is."""
        told = error.error if isinstance(error, _NotNow) else _unreachable(self._url, error)
        if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            raise told from None
        if isinstance(error, aiohttp.ClientConnectorError) and not self._reached:
            raise told from None
        pause_s = random.uniform(0, min(RETRY_MAX_S, RETRY_S * 2 ** min(self._failures, 30)))
        if isinstance(error, _NotNow) and error.after_s is not None:
            pause_s = error.after_s + random.uniform(0, RETRY_S)
        if time.monotonic() + pause_s - self._heard_at > self._give_up_s:
            raise told from None
        self._failures += 1
        await asyncio.sleep(pause_s)


async def _answer(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    retrying: _Retrying,
    body: bytes | None = None,
    **request: Any,
) -> Any:
    """Ask until there is an answer; only for what may be asked twice."""
    while True:
        if body is not None:
            request["data"] = io.BytesIO(body)  # a large one is written in pieces, and read anew each time
        try:
            async with session.request(method, url, timeout=_ANSWERED, **request) as response:
                await _raise_for(response)
                return orjson.loads(await response.read())
        except (aiohttp.ClientError, OSError, _NotNow) as error:
            await retrying.pause(error)


async def _raise_for(response: aiohttp.ClientResponse) -> None:
    if response.status in (200, 201):
        return
    error = _refusal(response.status, await response.read())
    response.close()  # or leaving it would wait until a body that was refused is sent
    if response.status in (408, 425, 429) or (response.status >= 500 and response.status != 501):
        raise _NotNow(error, _seconds(response.headers.get("Retry-After")))
    raise error


def _refusal(status: int, body: bytes) -> RelayError:
    """The error that a problem document stands for (RFC 9457)."""
    try:
        problem = orjson.loads(body)
        own = {name: problem.pop(name, None) for name in ("status", "title", "code", "detail")}
        code, title, detail = (str(own[name] or "") for name in ("code", "title", "detail"))
    except (orjson.JSONDecodeError, AttributeError):
        code = ""
    if not code:
        return Refused(
            f"The answer was {status} and not one of relay's.",
            code="not_relay", status=status, title="Not relay's answer",
        )  # fmt: skip
    kind = _BY_CODE.get(code)
    if kind is not None:
        return kind(detail, **problem)
    return Refused(detail, code=code, status=status, title=title or "Refused", **problem)


def _seconds(retry_after: str | None) -> float | None:
    """How long a `Retry-After` asks to wait (RFC 9110 section 10.2.3): a number, or a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _unreachable(url: str, error: Exception) -> Unreachable:
    base = url.partition("/relay/")[0]
    match error:
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return Unreachable(f"{base!r} is not a URL, such as http://127.0.0.1:8080.")
        case aiohttp.ClientConnectorDNSError():
            return Unreachable(f"There is no host {error.host!r}, or its name cannot be looked up.")
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
            return Unreachable(f"{base} cannot be reached by TLS: {error}")
        case aiohttp.ClientConnectorError():
            return Unreachable(f"Nothing answers at {base}.")
    return Unreachable(f"Cannot reach {base}: {str(error) or type(error).__name__}")


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
