"""The routes that write, under `/relay`: runs that producers push, and what anybody may end.

Errors are raised; the application turns them into problem documents. Members of a body that are null are
taken for not given, and unknown ones are refused: a misspelt wish would pass for none.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay import trace
from relay.api import Guarded, Json, run_object, stream_object
from relay.dialects.detect import BY_NAME
from relay.errors import (
    BodyTooLarge,
    Busy,
    InvalidName,
    InvalidParameter,
    MissingWriter,
    RunExists,
    UnsupportedMediaType,
)
from relay.frame import Event
from relay.headers import all_of
from relay.ingest.formats import FORMATS, FrameParser, events_of_json
from relay.ingest.proxy import IF_BUSY, SUPERSEDES_MAX, ClientGone, RunWishes
from relay.ingest.push import Piece, PushOpening, Receipt, Turn, key_of
from relay.ingest.upstream import UpstreamRequest, upstream_request
from relay.journal.base import RunInfo, StreamChange
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import (
    IDLE_TIMEOUT_MAX_S,
    METADATA_MAX_BYTES,
    OPTIONS_MAX_BYTES,
    RETENTION_MAX_S,
    WAIT_MAX_S,
    check_run_name,
    check_stream_name,
)
from relay.replay.news import news_of
from relay.replay.request import JSON, read_number
from relay.replay.response import CONNECTION, Receive, Scope, Send
from relay.security import Right
from relay.settings import NUMBER_MAX

if TYPE_CHECKING:
    from relay.app import App

_STREAM = "/relay/v1/streams/{stream}"
_RUN = _STREAM + "/runs/{run}"

_WISHES = ("run", "dialect", "supersedes", "if_busy", "idle_timeout_s", "seal", "metadata")

_FORMATS_SAID = ", ".join((JSON, *FORMATS))

# The reasons a producer may give, the usual one of each status first.
_PRODUCERS_REASONS = {
    Status.COMPLETED.value: (Reason.PRODUCER_END, Reason.INPUT_REQUIRED),
    Status.FAILED.value: (Reason.PRODUCER_FAILED,),
}


def push_routes(app: App) -> list[Route]:
    """The routes that write."""
    streams, runs, writers = StreamRoutes(app), RunRoutes(app), WriterRoutes(app)
    write = partial(Guarded, app.access, Right.WRITE)
    cancel = partial(Guarded, app.access, Right.CANCEL)
    return [
        write(_RUN + "/frames", FramesEndpoint(app), "POST"),
        write(_RUN + "/end", writers.end, "POST"),
        write(_RUN + "/heartbeat", writers.heartbeat, "POST"),
        write(_RUN + "/writer", runs.take_over, "POST"),
        cancel(_RUN + "/cancel", runs.cancel, "POST"),
        write(_STREAM + "/runs", runs.open, "POST"),
        cancel(_STREAM + "/cancel", runs.cancel_current, "POST"),
        write(_STREAM + "/seal", streams.seal, "POST"),
        write(_STREAM, streams.put, "PUT"),
        write(_STREAM, streams.delete, "DELETE"),
    ]


class StreamRoutes:
    """What is done to a stream."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def put(self, request: Request) -> Response:
        """`PUT /relay/v1/streams/{stream}`: create it, or change what the body gives."""
        stream = _stream(request.scope)
        given = await _members(request, ("retention_s", "max_frames", "max_bytes", "metadata"))
        change = StreamChange(
            max_frames=_whole_number(given, "max_frames"),
            max_bytes=_whole_number(given, "max_bytes"),
            retention_s=_whole_number(given, "retention_s", RETENTION_MAX_S),
            metadata=_metadata(given) if "metadata" in given else None,
        )
        created = await self._app.journal.put_stream(stream, self._app.settings.retention, change)
        return Json(
            stream_object(await self._app.journal.describe(stream)), status_code=201 if created else 200
        )

    async def seal(self, request: Request) -> Response:
        """`POST /relay/v1/streams/{stream}/seal`: it takes no further run."""
        stream = _stream(request.scope)
        await _members(request, ())
        await self._app.journal.seal(stream)
        return Json(stream_object(await self._app.journal.describe(stream)))

    async def delete(self, request: Request) -> Response:
        """`DELETE /relay/v1/streams/{stream}`: 204, whether or not there was one."""
        await self._app.pushes.delete(_stream(request.scope))
        return Response(status_code=204)


class RunRoutes:
    """How runs are opened, taken over and cancelled."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def open(self, request: Request) -> Response:
        """`POST /relay/v1/streams/{stream}/runs`: open a run, have relay call upstream for one, or send a
        whole one in the body."""
        stream = _stream(request.scope)
        media_type = _media_type(request.headers.get("content-type", ""))
        if media_type in FORMATS:
            return await self._whole(stream, media_type, request)
        if "end" in request.query_params:
            raise UnsupportedMediaType(f"A run in one request is sent as {', '.join(FORMATS)}.")
        # As large as frames may be pushed: it may hold what upstream is asked, a whole conversation.
        body = await _json_body(request, self._app.settings.buffered_body_max_bytes)
        given = _known_members(body, (*_WISHES, "upstream"))
        upstream = given.pop("upstream", None)
        opening = _opening(stream, given, request, body)
        if upstream is not None:
            return await self._start(opening, upstream, request.headers.get("traceparent", ""))
        turn = await self._app.pushes.open(opening)
        return Json(_turn_object(turn), status_code=201 if turn.opened else 200)

    async def _start(self, opening: PushOpening, upstream: Any, traceparent: str) -> Response:
        """The run of an answer that relay fetches itself."""
        if opening.idle_timeout_s is not None:
            raise InvalidParameter("A run of upstream's has no idle timeout.", parameter="idle_timeout_s")
        wishes = replace(opening.wishes, run=opening.run)
        called = _traced(upstream_request(upstream), traceparent)
        await self._app.pushes.check_key(opening)
        try:
            started = await self._app.start_run(opening.stream, called, wishes)
        except RunExists:
            if not opening.run:
                raise
            info = await self._app.journal.run(opening.stream, wishes.run)
            return Json(_known_object(opening.stream, info), status_code=202)
        document: dict[str, Any] = {
            "run": started.run, "stream": started.stream, "status": Status.OPEN, "reason": None,
            "cursor": str(started.cursor),
        }  # fmt: skip
        if started.frames_after is not None:
            document["frames_after"] = started.frames_after
        return Json(document, status_code=202)

    async def _whole(self, stream: str, media_type: str, request: Request) -> Response:
        end = _ending_asked_for(request.query_params)
        if end is None:
            raise InvalidParameter("A run in one request ends with it: add ?end=completed.", parameter="end")
        if "relay-seq" in request.headers:
            raise InvalidParameter("A run in one request is numbered from its first frame.")
        given: dict[str, Any] = dict(request.query_params)
        del given["end"]
        _refuse_unknown(given, _WISHES)
        if "supersedes" in given:
            given["supersedes"] = request.query_params.getlist("supersedes")
        if "idle_timeout_s" in given:
            given["idle_timeout_s"] = read_number(given, "idle_timeout_s", 0.0, IDLE_TIMEOUT_MAX_S)
        if "seal" in given:
            given["seal"] = {"true": True, "false": False}.get(given["seal"])
        if "metadata" in given:
            given["metadata"] = _parsed(given["metadata"].encode(), "'metadata'")
        opening = _opening(stream, given, request, request.scope["query_string"])
        request.scope["extensions"][CONNECTION].may_be_silent = True
        parser = FORMATS[media_type](self._app.settings.frame_max_bytes)
        turn, receipt = await self._app.pushes.push_whole(opening, parser, _body(request.receive), end)
        document = {"run": turn.run, "stream": stream, **receipt.members()}
        document |= {"status": turn.status, "reason": turn.reason}
        return Json(document | _superseding(turn), status_code=201 if turn.opened else 200)

    async def take_over(self, request: Request) -> Response:
        """`POST …/runs/{run}/writer`: a new writer token, for a producer that lost its own or takes over."""
        stream, run = _stream_and_run(request.scope)
        await _members(request, ())
        return Json(_turn_object(await self._app.pushes.take_over(stream, run)))

    async def cancel(self, request: Request) -> Response:
        """`POST …/runs/{run}/cancel`: end it, whoever produces it. The run, as it ended now or before."""
        stream, run = _stream_and_run(request.scope)
        info = await self._app.pushes.cancel(stream, run, await _cancel_reason(request))
        return Json(run_object(stream, info))

    async def cancel_current(self, request: Request) -> Response:
        """`POST …/streams/{stream}/cancel`: end its newest open run; `{"run": null}` when none is open."""
        stream = _stream(request.scope)
        reason = await _cancel_reason(request)
        run = (await self._app.journal.describe(stream)).current_run
        if not run:
            return Json({"stream": stream, "run": None})
        return Json(run_object(stream, await self._app.pushes.cancel(stream, run, reason)))


class FramesEndpoint:
    """`POST …/runs/{run}/frames`: journal frames.

    Past Starlette's requests and responses: for a small append they cost more than all the rest."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Append what the body holds, and answer with the receipt."""
        stream, run = _stream_and_run(scope)
        given: dict[bytes, bytes] = {}
        numbers = []
        for name, value in scope["headers"]:
            if name == b"relay-seq":
                numbers.append(value.decode("latin-1"))
            else:
                given.setdefault(name, value)
        writer = _writer(given.get(b"relay-writer", b"").decode("latin-1"))
        query: bytes = scope["query_string"]
        end = _ending_asked_for(QueryParams(query)) if query else None
        seq = _sequence(numbers)
        settings = self._app.settings
        media_type = _media_type(given.get(b"content-type", b"").decode("latin-1"))
        frames: list[Event] | FrameParser
        if media_type in FORMATS:
            scope["extensions"][CONNECTION].may_be_silent = True
            frames = FORMATS[media_type](settings.frame_max_bytes)
        else:
            body = await _whole_body(receive, settings.buffered_body_max_bytes)
            if body or media_type:
                _check_json(media_type, _FORMATS_SAID)
            frames = events_of_json(body, settings.frame_max_bytes) if body else []
        receipt = await self._app.pushes.push(stream, run, writer, seq, frames, _body(receive), end)
        answer = orjson.dumps(_receipt_object(receipt, end))
        headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", JSON.encode())]
        await scope["extensions"][CONNECTION].answer(200, headers, answer)


class WriterRoutes:
    """What else only a run's writer may do."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def end(self, request: Request) -> Response:
        """`POST …/runs/{run}/end`: `{status, reason?, error?}`."""
        stream, run = _stream_and_run(request.scope)
        writer = _writer(request.headers.get("relay-writer", ""))
        # An error text may be of any length; it is cut, and the run ends all the same.
        longest = self._app.settings.buffered_body_max_bytes
        given = await _members(request, ("status", "reason", "error"), longest)
        reasons = _PRODUCERS_REASONS.get(_word(given, "status", tuple(_PRODUCERS_REASONS)) or "", ())
        if not reasons:
            raise InvalidParameter("'status' is missing.", parameter="status")
        reason = Reason(_word(given, "reason", reasons) or reasons[0])
        error = _text(given, "error")
        if error and reason is not Reason.PRODUCER_FAILED:
            raise InvalidParameter("Only a run that failed has an error.", parameter="error")
        end = ending(reason, error)
        return Json(_receipt_object(await self._app.pushes.end(stream, run, writer, end), end))

    async def heartbeat(self, request: Request) -> Response:
        """`POST …/runs/{run}/heartbeat`: keep a silent run alive, and learn its status: at once, or with
        `wait` when it is open no longer, so long at most."""
        stream, run = _stream_and_run(request.scope)
        writer = _writer(request.headers.get("relay-writer", ""))
        wait_s = read_number(request.query_params, "wait", 0.0, WAIT_MAX_S)
        await _members(request, ())
        if wait_s:
            await self._until_over(stream, run, writer, wait_s, request)
        await self._app.journal.hear_of(stream, run, writer)
        info = await self._app.journal.run(stream, run)
        return Json(
            {
                "status": info.status,
                "reason": info.reason or None,
                "next_seq": info.frames + 1,
            }
        )

    async def _until_over(self, stream: str, run: str, writer: str, wait_s: float, request: Request) -> None:
        app, tails = self._app, self._app.tails
        if app.draining:
            raise Busy("This relay is shutting down.")
        idle_timeout_s = (await app.journal.run(stream, run)).idle_timeout_s
        deadline = tails.now() + wait_s
        connection = request.scope["extensions"][CONNECTION]
        with news_of(stream, tails, app.readers, connection) as news:
            while not app.draining:
                news.listen()  # before the question, so that no news after its answer is missed
                state = await app.journal.hear_of(stream, run, writer)
                if state.status is not Status.OPEN:
                    return
                # Who waits longer than the run may be silent is alive all the same.
                hear_at = min(deadline, tails.now() + idle_timeout_s / 3) if idle_timeout_s else deadline
                while await news.wait(hear_at - tails.now()):
                    news.listen()
                    if news.tail.deleted or news.tail.run_is_open(run) is False:
                        break
                if connection.lost:
                    raise ClientGone
                if tails.now() >= deadline:
                    return


# Answers


def _turn_object(turn: Turn) -> dict[str, Any]:
    """A run as its producer is told of it; without a writer token when it has ended."""
    document: dict[str, Any] = {
        "run": turn.run, "stream": turn.stream, "status": turn.status, "reason": turn.reason or None,
        "cursor": str(turn.start), "next_seq": turn.next_seq,
    }  # fmt: skip
    if turn.writer:
        document["writer"] = turn.writer
    return document | _superseding(turn)


def _known_object(stream: str, info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.run, "stream": stream, "status": info.status, "reason": info.reason or None,
        "cursor": str(info.start),
    }  # fmt: skip


def _superseding(turn: Turn) -> dict[str, Any]:
    if turn.opened is None or not turn.opened.superseded:
        return {}
    return {"superseded": list(turn.opened.superseded), "frames_after": turn.opened.frames_after}


def _receipt_object(receipt: Receipt, end: Ending | None) -> dict[str, Any]:
    document = receipt.members()
    if end is not None:
        document |= {"status": end.status, "reason": end.reason}
    return document


# Requests


def _stream(scope: Scope) -> str:
    if b"%2f" in scope["raw_path"].lower():
        # Decoded, it would be taken for another route.
        raise InvalidName("A stream's or run's name cannot hold a slash.")
    return check_stream_name(scope["path_params"]["stream"])


def _stream_and_run(scope: Scope) -> tuple[str, str]:
    return _stream(scope), check_run_name(scope["path_params"]["run"])


def _writer(given: str) -> str:
    writer = given.strip()
    if not writer:
        raise MissingWriter("Send the run's writer token as Relay-Writer.")
    return writer


def _sequence(given: list[str]) -> int:
    """The number of the first frame; 0 when it has none."""
    text = ",".join(given)  # two of them are none
    if not text:
        return 0
    if len(text) > 16 or not text.isascii() or not text.isdigit() or not 1 <= int(text) <= NUMBER_MAX:
        raise InvalidParameter(f"Relay-Seq is a number from 1 to {NUMBER_MAX}.", parameter="Relay-Seq")
    return int(text)


def _ending_asked_for(query: QueryParams) -> Ending | None:
    status = query.get("end")
    if status is None:
        return None
    if status not in _PRODUCERS_REASONS:
        raise InvalidParameter(f"'end' is one of: {', '.join(_PRODUCERS_REASONS)}.", parameter="end")
    return ending(_PRODUCERS_REASONS[status][0])


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _check_json(media_type: str, accepted: str = JSON) -> None:
    # Nothing else may pass for it: a page of another origin can send text without being asked.
    if media_type != JSON:
        raise UnsupportedMediaType(f"Say what the body is by Content-Type: {accepted}.")


def _body(receive: Receive) -> Callable[[], Awaitable[Piece]]:
    async def next_piece() -> Piece:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return Piece(message["body"], not message["more_body"])

    return next_piece


async def _whole_body(receive: Receive, max_bytes: int) -> bytes:
    next_piece = _body(receive)
    data, last = await next_piece()
    if last and len(data) <= max_bytes:
        return data
    body = bytearray(data)
    while not last and len(body) <= max_bytes:
        data, last = await next_piece()
        body += data
    if len(body) > max_bytes:
        raise BodyTooLarge(f"The body is larger than {max_bytes} bytes.", limit=max_bytes)
    return bytes(body)


async def _json_body(request: Request, max_bytes: int = OPTIONS_MAX_BYTES) -> bytes:
    body = await _whole_body(request.receive, max_bytes)
    if body:
        _check_json(_media_type(request.headers.get("content-type", "")))
    return body


async def _members(
    request: Request, known: tuple[str, ...], max_bytes: int = OPTIONS_MAX_BYTES
) -> dict[str, Any]:
    """The members of a JSON body that are given; of an empty one, none."""
    return _known_members(await _json_body(request, max_bytes), known)


def _known_members(body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    if not body:
        return {}
    given = _parsed(body, "The body")
    if not isinstance(given, dict):
        raise InvalidParameter("The body is not an object.")
    _refuse_unknown(given, known)
    return {name: value for name, value in given.items() if value is not None}


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidParameter(f"Not known here: {', '.join(unknown)}.", parameters=unknown)


def _parsed(text: bytes, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"{what} is not JSON: {error}") from None


async def _cancel_reason(request: Request) -> str:
    return _text(await _members(request, ("reason",)), "reason")


def _opening(stream: str, given: Mapping[str, Any], request: Request, body: bytes) -> PushOpening:
    """What is asked of a new run, checked; `body` is what an Idempotency-Key is bound to."""
    run, key = _text(given, "run"), request.headers.get("idempotency-key", "")
    supersedes = given.get("supersedes", [])
    if isinstance(supersedes, str):
        supersedes = [supersedes]
    if not isinstance(supersedes, list) or not all(isinstance(item, str) for item in supersedes):
        raise InvalidParameter("'supersedes' is a run, a list of runs, or 'latest'.", parameter="supersedes")
    names = [name.strip() for item in supersedes for name in item.split(",")]
    if len(names) > SUPERSEDES_MAX:
        raise InvalidParameter(f"'supersedes' names {SUPERSEDES_MAX} runs at most.", parameter="supersedes")
    for name in names:
        if name != "latest":
            check_run_name(name)
    seal = given.get("seal", False)
    if not isinstance(seal, bool):
        raise InvalidParameter("'seal' is true or false.", parameter="seal")
    wishes = RunWishes(
        run=check_run_name(run) if "run" in given else "",
        dialect=_word(given, "dialect", tuple(BY_NAME)) or "",
        metadata=_metadata(given),
        seal=seal,
        supersedes=names,
        if_busy=_word(given, "if_busy", IF_BUSY) or "allow",
    )
    headers = request.headers
    # Not of `request.url`, which Starlette builds with the Host that the client sent.
    whose = (headers.getlist(name) for name in ("authorization", "cookie", "relay-authorization"))
    scope = (request.scope["path"], *whose, key)
    return PushOpening(
        stream=stream,
        wishes=wishes,
        idle_timeout_s=_seconds(given, "idle_timeout_s", IDLE_TIMEOUT_MAX_S),
        key=key_of("POST", *scope) if key else "",
        digest=hashlib.sha256(body).hexdigest() if key else "",
    )


def _traced(called: UpstreamRequest, given: str) -> UpstreamRequest:
    """A call of relay's own, of the trace that it names, of its caller's, or of a new one."""
    named = (*all_of(called.headers, trace.HEADER), given)
    traceparent = next((value for value in named if trace.trace_id_of(value)), "")
    traceparent = traceparent or trace.new_traceparent(secrets.token_bytes(trace.RANDOM_BYTES))
    trace.TRACE_ID.set(trace.trace_id_of(traceparent))
    headers = [header for header in called.headers if header[0] != trace.HEADER]
    return called._replace(headers=[*headers, (trace.HEADER, traceparent.encode("latin-1"))])


def _text(given: Mapping[str, Any], name: str) -> str:
    text = given.get(name, "")
    if not isinstance(text, str):
        raise InvalidParameter(f"'{name}' is a string.", parameter=name)
    return text


def _word(given: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str | None:
    word = given.get(name)
    if word is not None and (not isinstance(word, str) or word not in allowed):
        raise InvalidParameter(f"'{name}' is one of: {', '.join(allowed)}.", parameter=name)
    return word


def _seconds(given: Mapping[str, Any], name: str, most: float) -> float | None:
    seconds = given.get(name)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= most:
        raise InvalidParameter(f"'{name}' is a number more than 0, and {most:g} at most.", parameter=name)
    return float(seconds)


def _whole_number(given: Mapping[str, Any], name: str, most: int = NUMBER_MAX) -> int | None:
    number = given.get(name)
    if number is None:
        return None
    if isinstance(number, float) and number.is_integer():
        number = int(number)  # to JSON, 1.0 is a whole number
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
        raise InvalidParameter(f"'{name}' is a whole number from 0 to {most}.", parameter=name)
    return number


def _metadata(given: Mapping[str, Any]) -> str:
    """Metadata as JSON text, "" for none."""
    if "metadata" not in given:
        return ""
    try:
        text = orjson.dumps(given["metadata"])
    except TypeError as error:
        raise InvalidParameter(f"'metadata' cannot be kept: {error}", parameter="metadata") from None
    if len(text) > METADATA_MAX_BYTES:
        raise InvalidParameter(f"'metadata' is larger than {METADATA_MAX_BYTES} bytes.", parameter="metadata")
    return text.decode()
