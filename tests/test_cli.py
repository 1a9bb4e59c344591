"""relay.cli: what starts, what refuses to start and says why, and where settings come from."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from producing import Producer
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import ScriptedUpstream

from relay.cli import cli, open_journal
from relay.errors import StartupError
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal
from relay.settings import Settings

DEADLINE_S = 60


def run(
    *arguments: str, cwd: Path, given: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command to its end, without what the caller's environment says of relay."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RELAY_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "relay", *arguments],
        cwd=cwd, env=kept | environment, input=given, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip


def pushing(relay: RelayProcess, stream: str, first: str) -> subprocess.Popen[str]:
    """`relay push` that has pushed a first line and waits for more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "push", stream, "--format", "lines", "--url", relay.url],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(first + "\n")
    process.stdin.flush()
    with Reading(f"{relay.url}/relay/v1/streams/{stream}/events?wait=60&control=none") as reading:
        assert reading.take(1)[0].data == first
    return process


def refusal(*arguments: str, cwd: Path, **environment: str) -> str:
    """Why `relay serve` did not start: one line, no traceback."""
    outcome = run("serve", "--port", "0", *arguments, cwd=cwd, **environment)
    assert outcome.returncode == 1, outcome
    assert "ready" not in outcome.stdout
    assert "Traceback" not in outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("relay: ")]
    return line


def test_a_redis_that_cannot_be_reached_stops_the_start(tmp_path: Path) -> None:
    line = refusal("--journal", "redis://user:secret@127.0.0.1:1/0", cwd=tmp_path)
    assert "cannot be reached" in line
    assert "secret" not in line


def test_an_evicting_redis_stops_the_start(tmp_path: Path) -> None:
    server = RedisServer.start("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    try:
        line = refusal("--journal", server.url(), cwd=tmp_path)
    finally:
        server.stop()
    assert "allkeys-lru" in line
    assert "noeviction" in line


@pytest.mark.parametrize(
    "url",
    [
        *("postgres://h/db", "relay.db", "", "sqlite://relative.db", "sqlite:///"),
        *("sqlite:///x.db?synchronous=off", "sqlite:///x.db?mode=ro"),
    ],
)
def test_a_journal_url_that_is_none_stops_the_start(url: str) -> None:
    with pytest.raises(StartupError, match="sqlite:///") as caught:
        open_journal(Settings(journal=url))
    assert "--journal" in caught.value.detail


def test_a_password_in_a_journal_url_is_not_shown() -> None:
    with pytest.raises(StartupError) as caught:
        open_journal(Settings(journal="postgres://user:secret@host/db?sentinel_password=secret"))
    assert "secret" not in caught.value.detail
    assert "***@host" in caught.value.detail


def test_a_journal_url_names_its_journal(tmp_path: Path) -> None:
    for url, path in (("sqlite:///a.db", "a.db"), (f"sqlite:///{tmp_path}/b.db", f"{tmp_path}/b.db")):
        journal = open_journal(Settings(journal=url))
        assert isinstance(journal, SqliteJournal)
        assert str(journal.path) == path
    sentinels = ("redis+sentinel://h,i:26380/main/1", "rediss+sentinel://h/main")
    for scheme in ("redis://h", "rediss://h", "unix:///run/redis.sock", *sentinels):
        assert isinstance(open_journal(Settings(journal=scheme)), RedisJournal)


def test_a_wrong_journal_url_is_said_by_the_command(tmp_path: Path) -> None:
    assert "is neither redis://… nor sqlite:///…." in refusal("--journal", "nonsense", cwd=tmp_path)


def test_a_file_that_cannot_be_a_journal_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a database, " * 100)
    with sqlite3.connect(tmp_path / "foreign.db") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    for path in ("folder", "text", "missing/relay.db", "foreign.db"):
        assert path.partition("/")[0] in refusal("--journal", f"sqlite:///{path}", cwd=tmp_path)


def test_a_file_that_another_relay_holds_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    with RelayProcess.start(journal=f"sqlite:///{path}"):
        line = refusal("--journal", f"sqlite:///{path}", cwd=tmp_path)
    assert "another" in line or "in use" in line


def test_a_port_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("--port", str(port), cwd=tmp_path)
    assert f"port {port}" in line
    assert "Choose another" in line
    assert "no such port" in refusal("--port", "70000", cwd=tmp_path)
    assert "Cannot listen on 192.0.2.1" in refusal("--host", "192.0.2.1", "--insecure-bind", cwd=tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "example.test"])
def test_an_address_others_can_reach_is_refused_unless_insisted_on(tmp_path: Path, host: str) -> None:
    line = refusal("--host", host, cwd=tmp_path)
    assert "without authentication" in line
    assert "--insecure-bind" in line


def test_it_listens_beyond_loopback_when_told_to(tmp_path: Path) -> None:
    with (
        RelayProcess.start(
            journal=f"sqlite:///{tmp_path / 'relay.db'}", host="0.0.0.0", insecure_bind=True
        ) as relay,
        Reading(f"http://127.0.0.1:{relay.port}/relay/healthz") as reading,
    ):
        assert reading.status == 200


def test_a_setting_out_of_range_stops_the_start(tmp_path: Path) -> None:
    assert "--heartbeat-s 0.0: must be more than 0" in refusal("--heartbeat-s", "0", cwd=tmp_path)
    assert "at most" in refusal("--max-bytes", "9" * 23, cwd=tmp_path)
    assert "none of" in refusal("--dialect", "klingon", "--upstream", "http://127.0.0.1:1", cwd=tmp_path)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://127.0.0.1:1/a?b=c", "http://127.0.0.1:1/#f", "ftp://127.0.0.1", "x"],
)
def test_an_upstream_that_is_no_base_url_stops_the_start(tmp_path: Path, url: str) -> None:
    assert f"--upstream {url!r}" in refusal("--upstream", url, cwd=tmp_path)


@pytest.mark.parametrize(
    ("host", "upstream"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("127.0.0.1", "http://localhost:8080/v1"),
        ("localhost", "http://[::1]:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://localhost:8080"),
        ("relay.example", "http://relay.example:8080"),
    ],
)
def test_relay_is_not_its_own_upstream(tmp_path: Path, host: str, upstream: str) -> None:
    """One request would be a thousand."""
    line = refusal("--host", host, "--port", "8080", "--upstream", upstream, "--insecure-bind", cwd=tmp_path)
    assert f"--upstream {upstream} is relay's own address" in line


@pytest.mark.parametrize("path", ["/xx", "/99999x", "/1/2"])
def test_a_redis_database_that_is_no_number_is_not_taken_for_the_first(tmp_path: Path, path: str) -> None:
    assert "database number" in refusal("--journal", f"redis://127.0.0.1:1{path}", cwd=tmp_path)


def test_settings_come_from_variables_and_flags_win(tmp_path: Path) -> None:
    line = refusal(cwd=tmp_path, RELAY_JOURNAL="nonsense-of-the-variable")
    assert "nonsense-of-the-variable" in line
    line = refusal("--journal", "of-the-flag", cwd=tmp_path, RELAY_JOURNAL="of-the-variable")
    assert "of-the-flag" in line
    line = refusal(cwd=tmp_path, RELAY_HEARTBEAT_S="-1")
    assert "--heartbeat-s -1.0" in line
    outcome = run("serve", cwd=tmp_path, RELAY_PORT="many")
    assert outcome.returncode == 2
    assert "RELAY_PORT" in outcome.stderr or "--port" in outcome.stderr


def test_every_setting_has_a_flag_with_its_meaning() -> None:
    text = re.sub(r"\s+", " ", CliRunner().invoke(cli, ["serve", "--help"], terminal_width=10_000).output)
    for flag in ("--upstream", "--journal", "--stream-from", "--heartbeat-s", "--insecure-bind"):
        assert flag in text
    assert "Silence after which a reader is sent a heartbeat." in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_exits_cleanly_when_told_to(tmp_path: Path, number: int) -> None:
    with RelayProcess.start(journal=f"sqlite:///{tmp_path / 'relay.db'}") as relay:
        assert any(
            "ready on http://127.0.0.1:" in line and "journal sqlite:///" in line for line in relay.log
        )
        relay.process.send_signal(number)
        assert relay.process.wait(DEADLINE_S) == 0
    assert not [line for line in relay.log if "Traceback" in line]


def test_tail_and_ls_speak_to_a_running_relay(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, tmp_path: Path
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as reading:
        reading.read()
    outcome = run("tail", name, "--run", "latest", "--url", relay.url, cwd=tmp_path)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert re.search(r"^2-\d+\t\tone$", outcome.stdout, re.M)
    outcome = run("ls", cwd=tmp_path, RELAY_URL=relay.url)
    assert outcome.returncode == 0
    assert re.search(rf"^{name}\t3-\d+\t1 runs\tidle\t", outcome.stdout, re.M)
    for command in (("tail", "nobody-" + name), ("ls", "--url", "http://127.0.0.1:1")):
        outcome = run(*command, cwd=tmp_path, RELAY_URL=relay.url)
        assert outcome.returncode == 1
        assert re.fullmatch(r"relay: (Unknown stream|Nothing answers).*\n", outcome.stderr)


def test_tail_ends_when_nobody_reads_its_lines(relay: RelayProcess, name: str) -> None:
    """As in `relay tail … | head -1`: it is no connection to relay that broke."""
    producer = Producer(relay, name)
    producer.push("one")
    command = [sys.executable, "-W", "error", "-m", "relay", "tail", name, "--url", relay.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        producer.push("more")
        producer.push("and more")
        assert process.wait(DEADLINE_S) == 130


def test_push_makes_a_run_of_standard_input_and_says_its_name(
    relay: RelayProcess, name: str, tmp_path: Path
) -> None:
    lines = ("--format", "lines", "--event", "say")
    outcome = run("push", name, *lines, "--url", relay.url, cwd=tmp_path, given="one\ntwo\n")
    assert (outcome.returncode, outcome.stdout) == (0, "")
    first = outcome.stderr.strip()
    record = whole_run(relay, name)
    assert record.ended["run"] == first
    assert [(frame.event, frame.data) for frame in record.frames] == [("say", "one"), ("say", "two")]
    options = ("--supersedes", "latest", "--run", "mine", "--metadata", '{"a": 1}')
    outcome = run("push", name, *options, cwd=tmp_path, given="three\n", RELAY_URL=relay.url)
    assert (outcome.returncode, outcome.stderr) == (0, "mine\n")
    assert whole_run(relay, name).texts == ["three\n"]
    outcome = run("inspect", name, "mine", "--transcript", cwd=tmp_path, RELAY_URL=relay.url)
    assert (outcome.returncode, json.loads(outcome.stdout)["text"]) == (0, "three\n")
    outcome = run("inspect", name, "--url", relay.url, cwd=tmp_path)
    runs = json.loads(outcome.stdout)["runs"]
    assert [(each["run"], each["superseded_by"], each["metadata"]) for each in runs] == [
        (first, "mine", None),
        ("mine", None, {"a": 1}),
    ]


def test_p7_a_push_that_waits_for_input_exits_when_it_is_cancelled_elsewhere(
    relay: RelayProcess, name: str, tmp_path: Path
) -> None:
    process = pushing(relay, name, "one")
    outcome = run("cancel", name, "--url", relay.url, cwd=tmp_path)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert re.fullmatch(r"\w+\tcancelled\tclient_cancel\n", outcome.stdout)
    assert process.wait(DEADLINE_S) == 1
    _, said = process.communicate()
    assert re.fullmatch(r"(\w+)\nrelay: The run '\1' has ended: cancelled, client_cancel\.\n", said)
    assert whole_run(relay, name).texts == ["one"]
    outcome = run("cancel", name, "--url", relay.url, cwd=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (0, "no run is open\n")


def test_p3_a_push_that_is_interrupted_fails_its_run(relay: RelayProcess, name: str) -> None:
    process = pushing(relay, name, "one")
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    _, said = process.communicate()
    assert re.fullmatch(r"\w+\n", said)
    record = whole_run(relay, name)
    assert record.outcome == ("failed", "producer_failed")
    assert record.ended["error"] == "The producer was interrupted."
    assert record.texts == ["one"]


def test_commands_that_cannot_be_done_say_why(relay: RelayProcess, name: str, tmp_path: Path) -> None:
    opened = Producer(relay, name)
    outcome = run("push", name, "--if-busy", "reject", cwd=tmp_path, given="", RELAY_URL=relay.url)
    assert (outcome.returncode, outcome.stderr) == (
        1,
        "relay: Stream has an open run. The stream has an open run.\n",
    )
    outcome = run("cancel", name, "nobody", cwd=tmp_path, RELAY_URL=relay.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert re.fullmatch(r"relay: Unknown run\..*\n", outcome.stderr)
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == [opened.run]


def test_wrong_options_of_push_and_inspect_are_said_before_relay_is_asked(tmp_path: Path) -> None:
    for command, said in (
        (("push", "s", "--metadata", "{"), "--metadata"),
        (("push", "s", "--format", "xml"), "--format"),
        (("push", "s", "--format", "ndjson", "--event", "e"), "--event"),
        (("inspect", "s", "--transcript"), "--transcript needs a run"),
    ):
        outcome = CliRunner().invoke(cli, [*command, "--url", "http://127.0.0.1:1"])
        assert outcome.exit_code == 2
        assert said in outcome.output
    closed = subprocess.run(
        [sys.executable, "-m", "relay", "push", "s", "--url", "http://127.0.0.1:1"],
        preexec_fn=lambda: os.close(0), capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert closed.returncode == 2
    assert "standard input is closed" in closed.stderr
