"""The OpenAI SDK, relay, and a server that speaks its API: what the example's README does, and says."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from relay_process import RelayProcess
from run_record import whole_run

from examples.example import Example, Interlude, body_of, once, posted

ANSWER = "Counting to forty:" + "".join(f" {number}" for number in range(1, 41))


class Scene(NamedTuple):
    """The example, running."""

    example: Example
    relay: RelayProcess
    interlude: Interlude

    def calls(self) -> Any:
        """How often the backend was asked; the README's own command."""
        return json.loads(self.example.shell(self.example.command("/calls")))["calls"]


@pytest.fixture(scope="module")
def scene(copy: Callable[..., Example]) -> Iterator[Scene]:
    example = copy("openai-compatible", 9000, 8080)
    with (
        example.server("uvicorn", 9000, PACE_S="0.01"),
        Interlude.before(example.ports[9000], b'"content"') as interlude,
        example.relay(upstream=interlude.proxy.url, port=example.ports[8080]) as relay,
    ):
        yield Scene(example, relay, interlude)


@pytest.fixture
def sdk(scene: Scene) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=scene.relay.url + "/v1", api_key="k", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, **headers: str) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    messages: Any = [{"role": "user", "content": "Count."}]
    return sdk.chat.completions.create(model="m", messages=messages, stream=True, extra_headers=names)


def texts(stream: Iterator[openai.types.chat.ChatCompletionChunk]) -> Iterator[str]:
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


def said(client: subprocess.Popen[str]) -> str:
    """What a client prints to its end."""
    text, _ = client.communicate(timeout=60)
    assert client.returncode == 0, text
    return text


def test_the_sdk_reads_an_answer_through_relay(scene: Scene) -> None:
    assert scene.example.shell("python client.py") == ANSWER + "\n"


def test_the_same_key_is_the_same_answer_and_ctrl_c_tells_how_to_go_on(scene: Scene, name: str) -> None:
    before = scene.calls()
    asking = scene.example.command("--key k1").replace("k1", name)
    with scene.interlude.holding(10), scene.example.background(asking) as leaving:
        assert leaving.stdout is not None
        shown = leaving.stdout.read(len("Counting to forty: 1 2 3"))
        leaving.send_signal(signal.SIGINT)
        shown, _, go_on = (shown + said(leaving)).partition("\n")
    assert shown != ANSWER
    assert ANSWER.startswith(shown)
    assert shown + scene.example.shell(go_on.removeprefix("Go on: ")) == ANSWER + "\n"
    assert scene.example.shell(asking) == ANSWER + "\n"
    assert scene.calls() == before + 1


def test_the_readmes_python_joins_one_answer_however_often_it_runs(scene: Scene, sdk: openai.OpenAI) -> None:
    before = scene.calls()
    (scene.example.directory / "snippet.py").write_text(scene.example.blocks("python")[0])
    with ask_as_the_snippet(sdk) as stream:
        assert next(texts(stream)) == ""
    for _ in range(2):
        assert scene.example.shell("python snippet.py") == ANSWER + "\n"
    assert scene.calls() == before + 1


def ask_as_the_snippet(sdk: openai.OpenAI) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    """The same request, to be left in its midst: relay looks at the body and at who asks."""
    messages: Any = [{"role": "user", "content": "Count to forty."}]
    key = {"Idempotency-Key": "k2", "Authorization": "Bearer unused"}
    return sdk.chat.completions.create(model="any", messages=messages, stream=True, extra_headers=key)


def test_a_stop_is_an_error_that_the_sdk_raises_and_what_was_said_is_kept(
    scene: Scene, sdk: openai.OpenAI, name: str
) -> None:
    stop = scene.example.command("sleep 1").replace("chat-1", name)
    with scene.interlude.holding(10), ask(sdk, Relay_Stream=name) as stream:
        answer = texts(stream)
        shown = list(islice(answer, 5))
        assert posted(stop)["reason"] == "client_cancel"
        with pytest.raises(openai.APIError):
            shown.extend(answer)
    assert whole_run(scene.relay, name).outcome == ("cancelled", "client_cancel")
    kept = scene.relay.json(f"/relay/v1/streams/{name}/runs/latest/transcript")["text"]
    assert kept.startswith("".join(shown))
    assert ANSWER.startswith(kept)


def test_the_curl_commands_stop_an_answer_by_its_name(scene: Scene) -> None:
    asking, stopping = (scene.example.command(words) for words in ("-H 'Relay-Stream", "sleep 1"))
    with scene.interlude.holding(10), scene.example.background(asking) as curl:
        once(lambda: scene.relay.json("/relay/v1/streams/chat-1").get("open_runs"))
        assert posted(stopping)["reason"] == "client_cancel"
        printed, _ = curl.communicate(timeout=60)
    assert '"error"' in printed.rpartition("data: ")[2]


@pytest.fixture(scope="module")
def certificate(copy: Callable[..., Example]) -> Path:
    """A folder with `certificate.pem` and `key.pem`, of localhost."""
    nginx = copy("nginx")
    nginx.shell(nginx.command("openssl"))
    return nginx.directory


def test_an_upstream_with_tls_is_verified(
    copy: Callable[..., Example], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = copy("openai-compatible", 9000, 8080)
    tls = [
        "--ssl-certfile",
        str(certificate / "certificate.pem"),
        "--ssl-keyfile",
        str(certificate / "key.pem"),
    ]
    upstream = f"https://localhost:{example.ports[9000]}"
    with example.server("uvicorn", 9000, *tls, PACE_S="0"):
        with example.relay(upstream=upstream, port=example.ports[8080]) as relay:
            assert relay.get("/calls")[0] == 502
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "certificate.pem"))
        with example.relay(upstream=upstream, port=example.ports[8080]):
            assert example.shell("python client.py") == ANSWER + "\n"
            assert json.loads(body_of(example.url(8080, "/calls"))) == {"calls": 1}
