"""Every setting of `relay serve`, once: its flag, its environment variable, its default and its meaning.

A field `heartbeat_s` is the flag `--heartbeat-s` and the variable `RELAY_HEARTBEAT_S`; flags win.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from relay.errors import StartupError
from relay.limits import FRAME_MAX_BYTES, RETENTION_MAX_S, Retention

NUMBER_MAX = 2**53
"""Every journal, and JSON, can hold it exactly."""

# A number has to be more than zero unless zero means "none", "never" or "at once".
_MAY_BE_ZERO = frozenset(
    (
        *("port", "max_frames", "max_bytes", "retention_s", "upstream_idle_s", "abandon_s", "max_run_s"),
        *("stream_readers_max", "client_readers_max", "client_requests_per_s", "auth_cache_s"),
        *("held_max_bytes", "held_total_max_bytes", "held_s", "rewind_grace_s"),
        *("group_ms", "ring_max_frames", "ring_max_bytes", "rings_max_bytes", "drain_grace_s", "retry_ms"),
    )
)


def _setting(default: Any, meaning: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": meaning} | metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Units are in the names: `_s` seconds, `_ms` milliseconds, `_bytes` bytes."""

    upstream: str = _setting("", "Base URL of the agent backend; without it relay only serves /relay.")
    journal: str = _setting(
        "sqlite:///relay.db", "Where frames are kept: redis://…, redis+sentinel://… or sqlite:///path."
    )
    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8080, "Port to listen on; 0 picks a free one.")
    workers: int = _setting(1, "Processes that serve the port; more than one need Redis.")
    insecure_bind: bool = _setting(False, "Allow an address other than loopback without authentication.")
    admin_addr: str = _setting(
        "", "HOST:PORT where listing, diagnostics and metrics are served instead of on the main port."
    )

    log_format: str = _setting(
        "auto", "Lines for people, or JSON objects; auto is JSON unless they go to a terminal.",
        choices=("auto", "json", "text"),
    )  # fmt: skip

    producer_key: tuple[str, ...] = _setting(
        (), "Reads, writes and cancels every stream: what your backend holds. Repeatable."
    )
    admin_key: tuple[str, ...] = _setting((), "Does everything, listing and metrics too. Repeatable.")
    jwt_secret: str = _setting("", "Verifies tokens (JWT, HS256), and signs those that relay gives out.")
    jwt_public_key: str = _setting("", "PEM file of the key that verifies tokens: RS256 or EdDSA.")
    jwks_url: str = _setting("", "Where the keys that verify tokens are published (RS256, EdDSA).")
    jwt_audience: str = _setting("relay", "What a token's 'aud' must hold.")
    jwt_issuer: str = _setting("", "What a token's 'iss' must be; any, when this is empty.")
    token_s: float = _setting(24 * 3600.0, "Life of the token that a proxied answer brings for its stream.")
    auth_url: str = _setting("", "Asked whether a request may read, write or cancel a stream.")
    auth_cache_s: float = _setting(10.0, "How long its answers are remembered.")
    auth_recheck_s: float = _setting(
        300.0, "A reader that it let in reconnects after so long, to be asked for."
    )
    cors_origin: tuple[str, ...] = _setting(
        (), "Origin of pages elsewhere that may use relay's own routes: https://app.example. Repeatable."
    )
    allowed_host: tuple[str, ...] = _setting(
        (), "Host names that requests may ask for; *.example.com for all under it. Repeatable."
    )
    trusted_proxy: tuple[str, ...] = _setting(
        (), "Addresses or networks whose X-Forwarded-For is believed. Repeatable."
    )

    stream_from: tuple[str, ...] = _setting(
        (), "Where a request names its stream: path:/chat/{stream}, body:/pointer or header:Name. Repeatable."
    )
    resume_route: tuple[str, ...] = _setting(
        (), "Answered with a stream's current run: 'GET /chat/{stream}/stream'. Repeatable."
    )
    stop_route: tuple[str, ...] = _setting(
        (), "Cancels a stream's current run: 'POST /chat/{stream}/stop'. Repeatable."
    )
    passthrough: tuple[str, ...] = _setting((), "Paths (globs) that are never journaled. Repeatable.")
    journal_down: str = _setting(
        "fail", "A stream that begins while the journal is away: fail or passthrough.",
        choices=("fail", "passthrough"),
    )  # fmt: skip
    dialect: str = _setting("", "Treat every stream as this dialect instead of detecting it.")

    redis_prefix: str = _setting("relay", "First part of every Redis key and channel.")
    journal_timeout_s: float = _setting(5.0, "Longest wait for one answer of the journal.")
    journal_deadline_s: float = _setting(60.0, "How long a run waits for a journal that went away.")
    max_frames: int = _setting(Retention().max_frames, "Frames a stream keeps; 0 is no bound.")
    max_bytes: int = _setting(Retention().max_bytes, "Data bytes a stream keeps; 0 is no bound.")
    retention_s: int = _setting(Retention().retention_s, "A stream is dropped so long after its last append.")

    frame_max_bytes: int = _setting(FRAME_MAX_BYTES, "Largest frame.")
    open_runs_max: int = _setting(10_000, "Open proxied runs of this process.")
    readers_max: int = _setting(20_000, "Open readers of this process.")
    connections_max: int = _setting(35_000, "Open connections of clients to this process.")
    stream_readers_max: int = _setting(0, "Open readers of one stream in this process; 0 is no bound.")
    client_readers_max: int = _setting(0, "Open readers of one client in this process; 0 is no bound.")
    client_requests_per_s: float = _setting(
        0.0, "Requests of one client, with a burst of ten times as many; 0 is no bound."
    )
    head_timeout_s: float = _setting(15.0, "Longest wait for the rest of a request's head.")
    body_timeout_s: float = _setting(60.0, "Longest silence within a request's body, frames pushed apart.")
    buffered_body_max_bytes: int = _setting(
        16 * 1024 * 1024, "Largest request body kept in memory, for its key or to find a name in it."
    )
    idempotency_keep_s: float = _setting(24 * 3600.0, "How long an Idempotency-Key is remembered.")
    claim_lease_s: float = _setting(15.0, "A pending Idempotency-Key lapses so long after its holder died.")

    upstream_connect_timeout_s: float = _setting(10.0, "Longest wait for a connection to upstream.")
    upstream_header_timeout_s: float = _setting(300.0, "Longest wait for the head of upstream's answer.")
    upstream_idle_s: float = _setting(0.0, "A stream silent for so long fails; 0 is never.")
    owner_lease_s: float = _setting(6.0, "A process not heard of for so long has died; its runs are lost.")
    idle_timeout_s: float = _setting(300.0, "A pushed run not heard of for so long is lost.")
    held_max_bytes: int = _setting(
        256 * 1024, "Accepted data bytes of a run kept to put back if the journal loses them."
    )
    held_total_max_bytes: int = _setting(64 * 1024 * 1024, "The same, of all runs of this process.")
    held_s: float = _setting(10.0, "How long accepted frames are kept for that.")
    rewind_grace_s: float = _setting(5.0, "How long readers wait for frames that the journal lost.")

    webhook_url: str = _setting("", "Where the transcript of each run that ended is posted.")
    webhook_secret: str = _setting("", "Signs what is posted: whsec_ and base64, as in Standard Webhooks.")
    webhook_allow_private: bool = _setting(False, "Post to loopback and private addresses too.")
    webhook_timeout_s: float = _setting(15.0, "Longest wait for the receiver's answer.")
    webhook_give_up_s: float = _setting(23 * 3600.0, "A run is not tried again so long after the first try.")
    transcript_max_bytes: int = _setting(16 * 1024 * 1024, "Largest text of a transcript; the rest is cut.")

    abandon_s: float = _setting(600.0, "A raw run that nobody read for so long is cancelled; 0 is never.")
    max_run_s: float = _setting(24 * 3600.0, "A run is cancelled after so long; 0 is never.")

    heartbeat_s: float = _setting(15.0, "Silence after which a reader is sent a heartbeat.")
    write_timeout_s: float = _setting(30.0, "A reader that takes nothing for so long is cut.")
    reader_max_s: float = _setting(3600.0, "A GET is rotated after about so long.")
    retry_ms: int = _setting(1000, "Pause that clients are told to keep before they reconnect.")
    compress: str = _setting(
        "remote",
        "Compress streams for clients that accept it: remote ones, always, or never.",
        choices=("remote", "always", "never"),
    )
    group_ms: float = _setting(3.0, "Under load, one stream's frames are written together over so long.")
    ring_max_frames: int = _setting(4096, "Recent frames kept in memory per followed stream.")
    ring_max_bytes: int = _setting(1024 * 1024, "Recent data bytes kept in memory per followed stream.")
    rings_max_bytes: int = _setting(256 * 1024 * 1024, "Recent data bytes kept in memory per process.")
    quiet_check_s: float = _setting(2.0, "A followed stream quiet for so long is checked in the journal.")
    drain_grace_s: float = _setting(10.0, "Time that open runs get to finish at shutdown.")

    def __post_init__(self) -> None:
        """Refuse numbers that no part of relay can work with; raises `StartupError`."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = "0 or more" if setting.name in _MAY_BE_ZERO else "more than 0"
            if value == 0 and setting.name in _MAY_BE_ZERO:
                continue
            # Durations are times in milliseconds somewhere, with something added to them.
            most = RETENTION_MAX_S if setting.name.endswith("_s") else NUMBER_MAX
            if not 0 < value <= most:
                flag = setting.name.replace("_", "-")
                raise StartupError(f"--{flag} {value}: must be {least}, and {most} at most.")

    @property
    def retention(self) -> Retention:
        """What a stream made by relay keeps."""
        return Retention(self.max_frames, self.max_bytes, self.retention_s)
