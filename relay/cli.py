"""The command line: `relay serve` and `demo`, and what speaks to a running relay."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import click
import orjson
import uvloop

from relay.access import is_loopback
from relay.app import App
from relay.commands import PushOptions, cancel_run, list_streams, push_run, show, tail_stream
from relay.demo import sample_agent
from relay.doctor import examine, examine_settings, tell
from relay.errors import RelayError, StartupError
from relay.journal.base import Journal
from relay.logs import json_line, set_up
from relay.metrics import share_metrics
from relay.security import Right, mint
from relay.server import RelayServer, allow_connections, server
from relay.settings import Settings
from relay.workers import Supervisor, Worker

log = logging.getLogger("relay.cli")

_URL = click.option("--url", envvar="RELAY_URL", default="http://127.0.0.1:8080", show_default=True)
_TOKEN = click.option(
    "--token", envvar="RELAY_TOKEN", default="", help="A token or a key, where relay asks for one."
)


def main() -> None:
    """The `relay` command."""
    cli(prog_name="relay")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="relay-sidecar")
def cli() -> None:
    """Resumable streams for agent backends: one journal, one cursor, live and replay."""


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option and one environment variable for every field of `Settings`."""
    for setting in reversed(dataclasses.fields(Settings)):
        default = setting.default
        several = isinstance(default, tuple)
        choices = setting.metadata.get("choices")
        command = click.option(
            "--" + setting.name.replace("_", "-"),
            setting.name,
            envvar="RELAY_" + setting.name.upper(),
            default=default,
            show_default=default not in ("", ()),
            multiple=several,
            is_flag=isinstance(default, bool),
            type=click.Choice(choices) if choices else str if several else type(default),
            help=setting.metadata["help"],
            show_envvar=True,
        )(command)
    return command


@cli.command()
@_settings_options
def serve(**options: Any) -> None:
    """Run relay in front of an agent backend."""
    worker = Worker.of_this_process()
    if worker is not None:
        _work(worker, options)
    elif options["workers"] > 1:
        is_json = set_up(options["log_format"])
        # Not on uvloop, which cannot start a process in a group of its own.
        _run(_supervise(options, is_json), asyncio.run)
    else:
        is_json = set_up(options["log_format"])
        _run(_serve_with(options, is_json))


@cli.command()
@click.option("--port", default=8080, show_default=True, help="Port of the page; 0 picks a free one.")
@click.option("--journal", default="sqlite:///relay-demo.db", show_default=True, help="As for serve.")
def demo(port: int, journal: str) -> None:
    """Run relay in front of a built-in sample agent, with a page to watch, cut and resume."""
    set_up("text", logging.WARNING)
    _run(_demo(port, journal))


@cli.command()
@click.argument("stream")
@_URL
@_TOKEN
@click.option("--after", default="start", show_default=True, help="A cursor, 'start' or 'tail'.")
@click.option("--run", default=None, help="One run only: its name, 'current' or 'latest'.")
@click.option("--wait", default=0.0, help="Seconds to wait for a stream that does not exist yet.")
@click.option("--json", "as_json", is_flag=True, help="Print frame objects, one a line.")
def tail(stream: str, url: str, token: str, after: str, run: str | None, wait: float, as_json: bool) -> None:
    """Follow a stream: one line a frame, resumed across disconnects, until it ends."""
    _run(tail_stream(url, stream, after, run, wait, as_json, click.echo, token))


@cli.command()
@_URL
@_TOKEN
def ls(url: str, token: str) -> None:
    """List the streams of a running relay."""
    _run(list_streams(url, click.echo, token))


@cli.command()
@click.argument("stream")
@click.option(
    "--run",
    default=None,
    help="Name of the run; the same lines can be pushed again under it, and are journaled once.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "lines", "ndjson")),
    default="text",
    show_default=True,
    help="What a frame is: a piece of text as it comes, a line, or an object {event, data} a line.",
)
@click.option("--event", default="", help="Event name of every frame; not with ndjson.")
@click.option("--dialect", default=None, help="Payload format of the frames; detected otherwise.")
@click.option("--supersedes", default=None, help="Run that this one replaces, or 'latest'.")
@click.option("--if-busy", type=click.Choice(("allow", "reject", "supersede")), default=None)
@click.option("--metadata", default=None, help="JSON kept with the run.")
@_URL
@_TOKEN
def push(
    stream: str, form: str, event: str, metadata: str | None, url: str, token: str, **opening: str | None
) -> None:
    """Make one run of standard input, frame by frame as it comes, and complete it at its end."""
    given: dict[str, Any] = {name: value for name, value in opening.items() if value is not None}
    if metadata is not None:
        try:
            given["metadata"] = orjson.loads(metadata)
        except orjson.JSONDecodeError as error:
            raise click.BadParameter(f"not JSON: {error}", param_hint="--metadata") from None
    if event and form == "ndjson":
        raise click.UsageError("--event is not for ndjson, whose objects name their events")
    options = PushOptions(form, event, given)
    if sys.stdin is None:
        raise click.UsageError("standard input is closed")
    # Not through sys.stdin: a thread that waits for input would hold its lock, which aborts our exit.
    read = partial(os.read, sys.stdin.fileno())
    _run(push_run(url, stream, read, options, partial(click.echo, err=True), token))


@cli.command()
@click.argument("stream")
@click.argument("run", required=False)
@_URL
@_TOKEN
def cancel(stream: str, run: str | None, url: str, token: str) -> None:
    """Cancel a run, or the current one of a stream. What it said so far is kept."""
    _run(cancel_run(url, stream, run, click.echo, token))


@cli.command()
@click.argument("stream")
@click.argument("run", required=False)
@click.option("--transcript", is_flag=True, help="The text of the run instead of its state.")
@_URL
@_TOKEN
def inspect(stream: str, run: str | None, transcript: bool, url: str, token: str) -> None:
    """Print what relay knows of a stream and its runs, or of one run, as JSON."""
    if transcript and run is None:
        raise click.UsageError("--transcript needs a run: relay inspect STREAM RUN --transcript")
    _run(show(url, stream, run, transcript, click.echo, token))


@cli.command()
@click.option(
    "--url", envvar="RELAY_URL", default="", help="A running relay.  [default: http://127.0.0.1:8080]"
)
@click.option("--public-url", default="", help="How clients reach it, if that is another way.")
@click.option("--admin-url", default="", help="Where its administration listens, if it has --admin-addr.")
@click.option("--journal", default="", help="As for serve: looked at from here, whether or not relay runs.")
@click.option("--upstream", default="", help="As for serve: the same.")
@_TOKEN
def doctor(url: str, public_url: str, admin_url: str, journal: str, upstream: str, token: str) -> None:
    """Look for what will hurt: of a running relay, or of the settings of one to be started."""
    # Settings alone are asked about before there is a relay.
    if not url and not public_url and not admin_url and not (journal or upstream):
        url = "http://127.0.0.1:8080"
    url = url or public_url or admin_url
    _run(_doctor(url, public_url or url, admin_url or url, journal, upstream, token))


@cli.command()
@click.argument("streams", nargs=-1, required=True)
@click.option(
    "--scope",
    "rights",
    multiple=True,
    type=click.Choice([right.value for right in Right]),
    default=(Right.READ.value,),
    show_default=True,
    help="What the token allows. Repeatable.",
)
@click.option("--expires", "life", default="1h", show_default=True, help="30s, 15m, 12h or 7d.")
@click.option("--subject", default="", help="Whose it is, for the log.")
@click.option("--audience", envvar="RELAY_JWT_AUDIENCE", default="relay", show_default=True)
@click.option("--issuer", envvar="RELAY_JWT_ISSUER", default="")
@click.option("--secret", envvar="RELAY_JWT_SECRET", required=True, help="As relay has it.", show_envvar=True)
def token(
    streams: tuple[str, ...], rights: tuple[str, ...], life: str, subject: str, audience: str, issuer: str,
    secret: str,
) -> None:  # fmt: skip
    """Make a token for streams, named or by patterns with *: relay token 'chat-7.*' --scope read."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = life[:-1], life[-1:]
    if unit not in units or not number.isascii() or not number.isdigit() or not int(number):
        raise click.BadParameter("write 30s, 15m, 12h or 7d", param_hint="--expires")
    try:
        made = mint(
            secret, map(Right, rights), streams, int(number) * units[unit],
            audience=audience, issuer=issuer, subject=subject,
        )  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(made)


async def _doctor(url: str, public_url: str, admin_url: str, journal: str, upstream: str, token: str) -> None:
    findings = []
    if journal or upstream:
        opened = open_journal(Settings(journal=journal)) if journal else None
        path: Path | None = getattr(opened, "path", None)
        findings += await examine_settings(None if path else opened, path, upstream)
    if url:
        findings += await examine(url, admin_url, public_url, token)
    if not tell(findings, click.echo):
        sys.exit(1)


def _run(work: Coroutine[Any, Any, None], run: Callable[..., None] = uvloop.run) -> None:
    try:
        run(work)
    except RelayError as error:
        click.echo(f"relay: {error.detail or error.title}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


async def _serve_with(options: dict[str, Any], is_json: bool) -> None:
    settings = Settings(**options)
    await _serve(settings, partial(_say_ready, settings, is_json))


async def _supervise(options: dict[str, Any], is_json: bool) -> None:
    """Have several workers run relay until told to stop."""
    settings = Settings(**options)
    _check_bind(settings)
    _check_upstream(settings)
    if urlsplit(settings.journal).scheme == "sqlite":
        raise StartupError(
            f"--workers {settings.workers} needs a Redis journal, --journal redis://…: an SQLite file "
            "belongs to one process."
        )
    with _listen(settings.host, settings.port) as reserved:
        supervisor = Supervisor(settings, reserved)
        if not await supervisor.run(lambda: _say_ready(settings, is_json, _url(reserved))):
            sys.exit(1)


def _work(worker: Worker, options: dict[str, Any]) -> None:
    """Be one of several workers."""
    set_up(options["log_format"], worker=worker.number)
    share_metrics(worker.directory, worker.number)
    try:
        uvloop.run(_serve(Settings(**options), lambda url: worker.say_ready(), worker))
    except RelayError as error:
        worker.say_failed(error.detail or error.title)
        sys.exit(1)


async def _serve(settings: Settings, ready: Callable[[str], None], worker: Worker | None = None) -> None:
    """Run relay until it is told to stop. `ready` is called when it serves, with the URL where."""
    _check_bind(settings)
    _check_upstream(settings)
    wanted = settings.connections_max + settings.open_runs_max
    allowed = allow_connections(wanted)
    if allowed < wanted:
        # A bound that cannot be reached would refuse nobody: the system would, and the journal's files too.
        fewer = max(1, settings.connections_max * allowed // wanted)
        settings = dataclasses.replace(settings, connections_max=fewer)
    async with contextlib.AsyncExitStack() as lasting:
        place = worker.socket() if worker else _listen(settings.host, settings.port)
        listener = lasting.enter_context(place)
        app = App(settings, open_journal(settings), worker)
        try:
            await app.start()
            await lasting.enter_async_context(_administration(app, settings, shared=worker is not None))
            serving = server(app, app.drain, settings, counts=app.counts)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, serving.handle_exit, number, None)
            if worker is not None:
                worker.when_orphaned(partial(serving.handle_exit, signal.SIGTERM, None))
            task = await _started(serving, listener)
            url = _url(listener)
            gc.collect()
            # What start-up made stays; a quarter of a replay's CPU went into the collector's visits to it.
            gc.freeze()
            # Nothing that a request or run leaves behind knows itself, so that only what is young has to be
            # visited: a full collection stops 5,000 open runs for the better part of a second.
            gc.set_threshold(700, 10, 1000)
            ready(url)
            if allowed < wanted:
                log.info(
                    "clients may have %d connections, fewer than --connections-max: open files are limited",
                    settings.connections_max,
                )
            await task
        finally:
            await app.close()


@contextlib.asynccontextmanager
async def _administration(app: App, settings: Settings, *, shared: bool) -> AsyncIterator[None]:
    """Serve `--admin-addr`, if there is one; several workers share it as they do the port."""
    if not settings.admin_addr:
        yield
        return
    host, port = _admin_address(settings)
    if shared and not port:
        raise StartupError("--admin-addr needs a port of its own with --workers.")
    with _listen(host, port, shared=shared) as listener:
        serving = server(app.administration, _nothing, settings, grace_s=1, counts=app.counts)
        task = await _started(serving, listener)
        log.info("relay's administration is on %s", _url(listener))
        try:
            yield
        finally:
            serving.should_exit = True
            await task


async def _nothing() -> None:
    pass


async def _demo(port: int, journal: str) -> None:
    with _listen("127.0.0.1", 0) as listener:
        agent = server(sample_agent(), _nothing, Settings(), grace_s=1)
        task = await _started(agent, listener)
        upstream = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            await _serve(
                # The page names its chats itself, also through a proxy that speaks for somebody else.
                Settings(
                    upstream=upstream,
                    journal=journal,
                    port=port,
                    drain_grace_s=1.0,
                    stream_from=("header:Relay-Stream",),
                ),
                lambda url: click.echo(
                    f"A sample agent that knows nothing of relay listens on {upstream}.\n"
                    f"Open {url}/ and ask something. Stop with Ctrl-C."
                ),
            )
        finally:
            agent.should_exit = True
            await task


async def _started(serving: RelayServer, listener: socket.socket) -> asyncio.Task[None]:
    """Serve on a socket; the task ends when the server does."""
    task = asyncio.create_task(serving.serve([listener]))
    ready = asyncio.create_task(serving.ready.wait())
    await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    return task


def open_journal(settings: Settings) -> Journal:
    """The journal a URL names; raises `StartupError`."""
    url = settings.journal
    scheme = urlsplit(url).scheme
    if scheme in ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"):
        from relay.journal.redis_streams import RedisJournal

        return RedisJournal(url, prefix=settings.redis_prefix, timeout_s=settings.journal_timeout_s)
    if scheme == "sqlite":
        from relay.journal.sqlite import SqliteJournal

        path, _, query = url.removeprefix("sqlite://").partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        synchronous = options.pop("synchronous", "normal")
        if not path.startswith("/") or path == "/" or options or synchronous not in ("normal", "full"):
            raise StartupError(
                f"--journal {url!r}: write sqlite:///relative.db or sqlite:////absolute.db, "
                "with ?synchronous=full to survive a power cut."
            )
        return SqliteJournal(Path(path[1:]), synchronous=synchronous)
    raise StartupError(f"--journal {_shown(url)!r} is neither redis://… nor sqlite:///….")


def _check_bind(settings: Settings) -> None:
    if settings.insecure_bind:
        return
    has_tokens = settings.jwt_secret or settings.jwt_public_key or settings.jwks_url
    if not (settings.producer_key or settings.admin_key or has_tokens or settings.auth_url):
        _refuse_bind(
            "--host", settings.host, "read every stream", "--admin-key and --jwt-secret or --auth-url"
        )
    if settings.admin_addr and not settings.admin_key:
        _refuse_bind("--admin-addr", _admin_address(settings)[0], "list every stream", "--admin-key")


def _refuse_bind(flag: str, host: str, harm: str, remedy: str) -> None:
    if not is_loopback(host):
        raise StartupError(
            f"{flag}: without authentication relay does not listen on {host}: whoever reaches it can {harm}. "
            f"Give {remedy}, or put something that authenticates before it and give --insecure-bind."
        )


def _check_upstream(settings: Settings) -> None:
    """Refuse to be one's own upstream, which one request would keep busy for ever."""
    parts = urlsplit(settings.upstream)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return  # which is no URL, and is said to be none
    host, here = parts.hostname or "", settings.host
    is_here = host == here or (is_loopback(host) and (is_loopback(here) or here in ("0.0.0.0", "::")))
    if is_here and port == settings.port:
        raise StartupError(f"--upstream {settings.upstream} is relay's own address; give the agent's.")


def _admin_address(settings: Settings) -> tuple[str, int]:
    host, _, port = settings.admin_addr.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise StartupError(f"--admin-addr {settings.admin_addr!r}: write HOST:PORT, such as 127.0.0.1:9464.")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _listen(host: str, port: int, *, shared: bool = False) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise StartupError(
                f"Cannot listen on {host} port {port}: {reason}. Choose another --host or --port."
            ) from None
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _say_ready(settings: Settings, is_json: bool, url: str) -> None:
    """Say where relay serves, to who started it."""
    said, journal = "relay is ready on %s (journal %s)", _shown(settings.journal)
    click.echo(json_line(log, said, url, journal) if is_json else said % (url, journal))


def _shown(url: str) -> str:
    """A journal URL without its passwords."""
    parts = urlsplit(url)
    if "password" in parts.query:
        parts = parts._replace(query="***")
    if "@" in parts.netloc:
        parts = parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2])
    return url if parts == urlsplit(url) else parts.geturl()
