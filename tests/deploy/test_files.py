"""The files of deploy/ are what the programs that read them take; they agree with each other and relay."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from held_port import held_port
from redis_server import RedisServer
from relay_process import RelayProcess

from deploy.tools import tool
from relay.settings import Settings
from relay.workers import CLOSING_S

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

WEIGHED = 2.0
"""What systemd calls "OK" ends at 5 of 10; relay needs the network, and sockets of this machine."""


def run(*command: str, **environment: str) -> str:
    """What a command prints; it must succeed."""
    outcome = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document


def pods() -> list[dict[str, Any]]:
    """The specifications of all Pods."""
    documents = [document for path in KUBERNETES for document in yaml.safe_load_all(path.read_text())]
    return [
        document["spec"]["template"]["spec"] for document in documents if document["kind"] == "Deployment"
    ]


def relay_in(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = (container for container in pod["containers"] if container["name"] == "relay")
    return found  # type: ignore[no-any-return]


def ending_s(drain_grace_s: float) -> float:
    """How long relay may take to end: as its workers' parent allows them to."""
    return drain_grace_s + 3 * Settings().journal_timeout_s + CLOSING_S


def slept_s(container: dict[str, Any]) -> float:
    name, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"
    return float(seconds)


# --- the image ----------------------------------------------------------------------------------------


def test_the_image_is_linted() -> None:
    run(tool("hadolint"), str(DEPLOY / "Dockerfile"))


def test_the_image_takes_what_it_is_built_of_and_nothing_else_is_sent() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {
        name for names in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for name in names.split()
    }
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in sent
    assert copied == {line[1:] for line in sent if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_does_not_run_as_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) > 0
    assert f"--uid {user}" in text
    for pod in pods():
        assert relay_in(pod)["securityContext"]["runAsUser"] == int(user)


def test_the_health_check_of_the_image_tells_a_relay_from_none(relay: RelayProcess) -> None:
    (line,) = re.findall(r"CMD (\[\"python\".*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    _, option, program = json.loads(line)
    assert "timeout=2" in program
    # A machine that has much else to do is no sick relay.
    command = [tool("python"), option, program.replace("timeout=2", "timeout=60")]
    run(*command, RELAY_PORT=str(relay.port))
    with held_port() as port:
        outcome = subprocess.run(command, env=os.environ | {"RELAY_PORT": str(port)}, capture_output=True)
    assert outcome.returncode != 0


# --- Compose ------------------------------------------------------------------------------------------


def test_compose_takes_its_file() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))


def test_docker_compose_takes_its_file() -> None:
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker has no compose plugin here")
    given = {"RELAY_ADMIN_KEY": "k" * 16, "RELAY_JWT_SECRET": "s" * 32}
    run(docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet", **given)


def test_relay_takes_the_settings_that_compose_and_the_pods_give_it() -> None:
    known = {f"RELAY_{name.upper()}" for name in Settings.__dataclass_fields__}
    secret = yaml.safe_load((DEPLOY / "kubernetes" / "secret.yaml").read_text())
    given = {name for pod in pods() for name in (env["name"] for env in relay_in(pod)["env"])}
    assert given | compose()["services"]["relay"]["environment"].keys() | secret["stringData"].keys() <= known


def test_the_redis_of_compose_keeps_what_it_accepted_and_evicts_nothing() -> None:
    name, *options = compose()["services"]["redis"]["command"].split()
    assert name == "redis-server"
    server = RedisServer.start(*options)
    try:
        with server.client() as client:
            found = client.config_get("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
    finally:
        server.stop()
    assert found.pop("maxmemory") != "0"
    assert found == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


def test_what_compose_mounts_is_there() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (DEPLOY / source).is_dir(), volume


def test_nothing_of_compose_is_reached_from_other_machines() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


# --- how long an end may take -------------------------------------------------------------------------


def test_compose_waits_until_relay_has_drained_and_the_agent_is_there_until_then() -> None:
    services = compose()["services"]
    relay, agent = (
        float(services[name]["stop_grace_period"].removesuffix("s")) for name in ("relay", "agent")
    )
    assert relay >= ending_s(Settings().drain_grace_s)
    assert agent >= relay


def test_kubernetes_waits_until_relay_has_drained() -> None:
    assert len(pods()) == 2
    for pod in pods():
        relay = relay_in(pod)
        (drain_s,) = (float(env["value"]) for env in relay["env"] if env["name"] == "RELAY_DRAIN_GRACE_S")
        assert pod["terminationGracePeriodSeconds"] >= slept_s(relay) + ending_s(drain_s)
        for agent in (container for container in pod["containers"] if container is not relay):
            assert slept_s(agent) >= slept_s(relay) + drain_s, (
                "it would end before the runs that are read of it"
            )


def test_systemd_waits_until_relay_has_drained() -> None:
    text = (DEPLOY / "systemd" / "relay.service").read_text()
    (wait_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert float(wait_s) >= ending_s(Settings().drain_grace_s)


# --- Kubernetes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_kubernetes_takes_its_files(path: Path) -> None:
    run(tool("kubernetes-validate"), "--strict", "-k", "1.32", str(path))


def test_probes_ask_what_relay_answers(relay: RelayProcess) -> None:
    for pod in pods():
        container = relay_in(pod)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        environment = {env["name"]: env["value"] for env in container["env"]}
        assert ports == {
            "http": int(environment["RELAY_PORT"]),
            "metrics": int(environment["RELAY_ADMIN_ADDR"].rpartition(":")[2]),
        }
        paths = {
            kind: container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("startup", "readiness", "liveness")
        }
        assert paths == {
            "startup": "/relay/readyz", "readiness": "/relay/readyz", "liveness": "/relay/healthz"
        }  # fmt: skip
        assert all(relay.get(path)[0] == 200 for path in paths.values())
        assert container["readinessProbe"]["timeoutSeconds"] > Settings().journal_timeout_s


def test_a_service_called_relay_does_not_set_relays_port() -> None:
    assert [pod["enableServiceLinks"] for pod in pods()] == [False, False]


# --- systemd ------------------------------------------------------------------------------------------


def test_systemd_takes_the_unit_and_finds_it_locked_up(tmp_path: Path) -> None:
    unit = tmp_path / "relay.service"
    text = (DEPLOY / "systemd" / "relay.service").read_text()
    unit.write_text(text.replace("/opt/relay/bin/relay", tool("relay")))
    analyze = tool("systemd-analyze")
    assert run(analyze, "verify", "--man=no", str(unit)) == ""
    if "--offline" not in run(analyze, "--help"):
        pytest.skip("systemd-analyze is too old to weigh a unit that is not installed")
    run(analyze, "security", "--offline=true", f"--threshold={int(WEIGHED * 10)}", str(unit))


# --- nginx and Grafana --------------------------------------------------------------------------------


def test_nginx_is_configured_as_in_its_example() -> None:
    """Which tests/examples/test_nginx.py runs."""
    assert (DEPLOY / "nginx.conf").resolve() == (ROOT / "examples" / "nginx" / "nginx.conf").resolve()
    assert (DEPLOY / "nginx.conf").is_file()


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    nginx, openssl = tool("nginx"), tool("openssl")
    shutil.copy(DEPLOY / "nginx.conf", tmp_path)
    run(
        openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
        "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem"),
    )  # fmt: skip
    run(nginx, "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf", "-t")


def test_grafana_finds_the_dashboard_and_prometheus_where_compose_has_them() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((provisioning / "dashboards" / "relay.yaml").read_text())["providers"][0]
    services = compose()["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_asks_compose_s_relay_with_its_key() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    relay = compose()["services"]["relay"]["environment"]
    port = relay["RELAY_ADMIN_ADDR"].rpartition(":")[2]
    assert job["static_configs"] == [{"targets": [f"relay:{port}"]}]
    (secret,) = compose()["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose()["secrets"][secret] == {"environment": "RELAY_ADMIN_KEY"}
