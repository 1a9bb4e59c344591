"""Every error relay raises on purpose, split by whose fault it is.

    RelayError
    ├── CallerError                 the request is wrong; 4xx or 501, retrying it unchanged is useless
    │   ├── MalformedCursor         400 malformed_cursor
    │   ├── InvalidName             400 invalid_name
    │   ├── InvalidParameter        400 invalid_parameter
    │   ├── InvalidEvent            400 invalid_event
    │   ├── MissingWriter           400 missing_writer
    │   ├── Unauthorized            401 unauthorized
    │   ├── Forbidden               403 forbidden
    │   ├── CrossOrigin             403 cross_origin
    │   ├── FrameTooLarge           413 frame_too_large
    │   ├── BodyTooLarge            413 body_too_large
    │   ├── RouteNotFound           404 route_not_found
    │   ├── UnknownStream           404 unknown_stream
    │   ├── UnknownRun              404 unknown_run
    │   ├── MethodNotAllowed        405 method_not_allowed
    │   ├── NotAcceptable           406 not_acceptable
    │   ├── RunExists               409 run_exists
    │   ├── RunEnded                409 run_ended
    │   ├── Fenced                  409 fenced
    │   ├── SequenceGap             409 sequence_gap
    │   ├── StreamSealed            409 stream_sealed
    │   ├── StreamBusy              409 stream_busy
    │   ├── CursorGone              410 cursor_gone
    │   ├── ResumeUnknown           410 resume_unknown
    │   ├── UnsupportedMediaType    415 unsupported_media_type
    │   ├── HostNotAllowed          421 host_not_allowed
    │   ├── KeyReused               422 idempotency_key_reused
    │   └── UpgradeUnsupported      501 upgrade_unsupported
    ├── UpstreamError               the backend behind relay failed; 502 or 504
    │   ├── UpstreamUnreachable     502 upstream_unreachable
    │   ├── UpstreamInvalid         502 upstream_invalid
    │   └── UpstreamSlow            504 upstream_timeout
    ├── JournalError                the journal failed; 503, worth retrying
    │   ├── JournalUnavailable      503 journal_unavailable
    │   ├── JournalRefused          503 journal_refused
    │   └── Rewound                 503 journal_rewound
    │       └── Diverged            503 journal_diverged
    ├── Busy                        503 busy: a limit of this process is reached, or it is draining
    │   ├── TooManyRequests         429 too_many_requests: a limit of one client or stream is reached
    │   └── AuthUnavailable         503 auth_unavailable: who decides on access cannot be asked
    └── StartupError                relay cannot start; the message says what to do

Anything else that escapes a request is a bug in relay.
"""

from __future__ import annotations

from typing import Any


class RelayError(Exception):
    """An error with a stable machine-readable `code` and the HTTP `status` it is answered with.

    `detail` is one sentence for the person reading it; `extra` are further members of the
    problem document (RFC 9457 section 3.2).
    """

    code: str = "internal"
    status: int = 500
    title: str = "Internal error"

    def __init__(self, detail: str = "", **extra: Any) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.extra = extra

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document: `title`, `status`, `code`, `detail` and the extra members."""
        document: dict[str, Any] = {"title": self.title, "status": self.status, "code": self.code}
        if self.detail:
            document["detail"] = self.detail
        return document | self.extra


class CallerError(RelayError):
    code, status, title = "bad_request", 400, "Bad request"


class MalformedCursor(CallerError):
    code, title = "malformed_cursor", "Malformed cursor"


class InvalidName(CallerError):
    code, title = "invalid_name", "Invalid stream or run name"


class InvalidParameter(CallerError):
    code, title = "invalid_parameter", "Invalid parameter"


class InvalidEvent(CallerError):
    code, title = "invalid_event", "Invalid event"


class MissingWriter(CallerError):
    code, title = "missing_writer", "Writer token is missing"


class Unauthorized(CallerError):
    """The request says not, or not validly, who sends it."""

    code, status, title = "unauthorized", 401, "Unauthorized"


class Forbidden(CallerError):
    code, status, title = "forbidden", 403, "Forbidden"


class CrossOrigin(CallerError):
    """A page of another site made a browser send the request."""

    code, status, title = "cross_origin", 403, "Cross-origin request"


class FrameTooLarge(CallerError):
    code, status, title = "frame_too_large", 413, "Frame too large"


class BodyTooLarge(CallerError):
    code, status, title = "body_too_large", 413, "Body too large"


class RouteNotFound(CallerError):
    code, status, title = "route_not_found", 404, "No such route"


class UnknownStream(CallerError):
    code, status, title = "unknown_stream", 404, "Unknown stream"


def unknown_stream(stream: str) -> UnknownStream:
    """What is said of a stream that is not there, and of one that is not this caller's: the same."""
    return UnknownStream(f"There is no stream '{stream}'.")


class UnknownRun(CallerError):
    code, status, title = "unknown_run", 404, "Unknown run"


def unknown_run(run: str) -> UnknownRun:
    """What is said of a run that its stream has not."""
    return UnknownRun(f"The stream has no run '{run}'.")


class MethodNotAllowed(CallerError):
    code, status, title = "method_not_allowed", 405, "Method not allowed"


class NotAcceptable(CallerError):
    code, status, title = "not_acceptable", 406, "Not acceptable"


class RunExists(CallerError):
    code, status, title = "run_exists", 409, "Run exists"


class RunEnded(CallerError):
    code, status, title = "run_ended", 409, "Run has ended"


class Fenced(CallerError):
    code, status, title = "fenced", 409, "Writer token is no longer valid"


class SequenceGap(CallerError):
    code, status, title = "sequence_gap", 409, "Producer sequence has a gap"


class StreamSealed(CallerError):
    code, status, title = "stream_sealed", 409, "Stream is sealed"


class StreamBusy(CallerError):
    code, status, title = "stream_busy", 409, "Stream has an open run"


class CursorGone(CallerError):
    code, status, title = "cursor_gone", 410, "Cursor is no longer in the journal"


class ResumeUnknown(CallerError):
    code, status, title = "resume_unknown", 410, "Resume id is unknown or expired"


class UnsupportedMediaType(CallerError):
    code, status, title = "unsupported_media_type", 415, "Unsupported media type"


class HostNotAllowed(CallerError):
    code, status, title = "host_not_allowed", 421, "Host is not served here"


class KeyReused(CallerError):
    code, status, title = "idempotency_key_reused", 422, "Idempotency key was used with another request"


class UpgradeUnsupported(CallerError):
    code, status, title = "upgrade_unsupported", 501, "Protocol upgrade is not supported"


class UpstreamError(RelayError):
    code, status, title = "upstream_error", 502, "Upstream failed"


class UpstreamUnreachable(UpstreamError):
    code, title = "upstream_unreachable", "Upstream cannot be reached"


class UpstreamInvalid(UpstreamError):
    code, title = "upstream_invalid", "Upstream's answer is not valid"


class UpstreamSlow(UpstreamError):
    code, status, title = "upstream_timeout", 504, "Upstream did not answer in time"


class JournalError(RelayError):
    code, status, title = "journal_error", 503, "Journal failed"


class JournalUnavailable(JournalError):
    """The journal could not be reached, or the outcome of an operation on it is not known."""

    code, title = "journal_unavailable", "Journal is unavailable"


class JournalRefused(JournalError):
    """The journal answered, but will not write: full disk, out of memory, read-only."""

    code, title = "journal_refused", "Journal refuses to write"


class Rewound(JournalError):
    """The journal lost frames that it had accepted: it failed over, or was restored from a copy."""

    code, title = "journal_rewound", "Journal lost accepted frames"


class Diverged(Rewound):
    """It lost them and was written on since."""

    code, title = "journal_diverged", "Journal was written on after it lost accepted frames"


class Busy(RelayError):
    code, status, title = "busy", 503, "Busy"


class TooManyRequests(Busy):
    code, status, title = "too_many_requests", 429, "Too many requests"


class AuthUnavailable(Busy):
    code, title = "auth_unavailable", "Authorization is unavailable"


class StartupError(RelayError):
    code, title = "startup", "relay cannot start"
