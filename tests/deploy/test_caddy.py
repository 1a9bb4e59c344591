"""Caddy in front of relay, as deploy/Caddyfile has it: HTTP/2, frames at once, cuts, clients that leave."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from held_port import held_port
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream

from deploy.tools import tool

CADDYFILE = Path(__file__).parent.parent.parent / "deploy" / "Caddyfile"
DEADLINE_S = 60


class Front(NamedTuple):
    """Caddy, and the relay behind it."""

    url: str
    relay: RelayProcess
    upstream: ScriptedUpstream

    def curl(self, path: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A client; its answer's head comes first."""
        command = [
            tool("curl"),
            "-kisSN",
            "--http2",
            "--max-time",
            str(DEADLINE_S),
            self.url + path,
            *arguments,
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def front(upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    caddy, directory = tool("caddy"), tmp_path_factory.mktemp("caddy")
    config = directory / "Caddyfile"
    # A certificate of its own, not made known to this machine, and nothing on port 80.
    config.write_text(
        CADDYFILE.read_text().replace(
            "admin off", "admin off\n\tskip_install_trust\n\tauto_https disable_redirects"
        )
    )
    with (
        held_port() as port,
        RelayProcess.start(journal=f"sqlite:///{directory / 'relay.db'}", upstream=upstream.url) as relay,
    ):
        own = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
        own |= {"RELAY_SITE": f"https://localhost:{port}", "RELAY_ADDRESS": f"127.0.0.1:{relay.port}"}
        command = [caddy, "run", "--adapter", "caddyfile", "--config", str(config)]
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output)
        try:
            url = f"https://localhost:{port}"
            asked = [tool("curl"), "-ksS", "--max-time", "5", f"{url}/relay/healthz"]
            deadline = time.monotonic() + DEADLINE_S
            while subprocess.run(asked, capture_output=True).returncode != 0:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield Front(url, relay, upstream)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def hold(upstream: ScriptedUpstream, name: str, media_type: str, first: bytes, last: bytes) -> Gate:
    """Script an answer that waits between two pieces."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", media_type)
        await exchange.chunk(first)
        await gate.wait()
        await exchange.chunk(last)
        await exchange.end()

    upstream.on(f"/{name}", handler)
    return gate


def read_until(client: subprocess.Popen[bytes], words: bytes) -> bytes:
    assert client.stdout is not None
    data = b""
    while words not in data:
        more = os.read(client.stdout.fileno(), 65536)
        assert more, data
        data += more
    return data


def test_caddy_takes_its_file_as_it_would_write_it(tmp_path: Path) -> None:
    caddy = tool("caddy")
    own = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    for command in (["adapt", "--validate", "--config"], ["fmt"]):
        outcome = subprocess.run([caddy, *command, str(CADDYFILE)], env=own, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == CADDYFILE.read_text()


@pytest.mark.parametrize(
    ("media_type", "first", "last"),
    [
        ("text/event-stream", b"data: first\n\n", b"data: last\n\n"),
        ("application/x-ndjson", b'{"say": "first"}\n', b'{"say": "last"}\n'),
    ],
)
def test_a_frame_is_there_while_the_answer_goes_on(
    front: Front, name: str, media_type: str, first: bytes, last: bytes
) -> None:
    gate = hold(front.upstream, name, media_type, first, last)
    client = front.curl(f"/{name}")
    begun = read_until(client, first)
    assert begun.startswith(b"HTTP/2 200")
    assert last not in begun
    gate.open()
    assert last in client.communicate(timeout=DEADLINE_S)[0]
    assert client.returncode == 0


def test_relay_sees_a_client_leave_who_then_goes_on_behind_its_last_event(front: Front, name: str) -> None:
    gate = hold(front.upstream, name, "text/event-stream", b"data: first\n\n", b"data: last\n\n")
    client = front.curl(f"/{name}")
    (cursor,) = re.findall(rb"^id: (\S+)$", read_until(client, b"data: first\n\n"), re.MULTILINE)
    assert front.relay.metric("relay_readers_open") == 1
    client.kill()
    client.communicate()
    deadline = time.monotonic() + DEADLINE_S
    while front.relay.metric("relay_readers_open"):
        assert time.monotonic() < deadline, "relay does not know that the client has left"
        time.sleep(0.05)
    client = front.curl(f"/{name}", "-H", f"Last-Event-ID: {cursor.decode()}")
    gate.open()
    rest, _ = client.communicate(timeout=DEADLINE_S)
    assert b"data: last\n\n" in rest
    assert b"data: first" not in rest
    assert front.upstream.calls(f"/{name}") == 1
