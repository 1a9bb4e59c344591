"""relay-stream.js: its unit tests in Node, its types, and that what is published is what is here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "relay" / "static"
UNIT_TESTS = sorted((ROOT / "tests" / "js").glob("*.test.mjs"))

DEADLINE_S = 300


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.fail(f"These tests need {command[0]}. `python3 dev.py setup` installs it.")
    return subprocess.run(
        command, cwd=cwd, timeout=DEADLINE_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name.removesuffix(".test.mjs"))
def test_the_unit_tests_pass_in_node(path: Path) -> None:
    outcome = run("node", "--test", path)
    assert outcome.returncode == 0, outcome.stdout


def test_the_types_fit_what_users_write_and_the_chat_transport_fits_the_ai_sdk(
    node_packages: Path, tmp_path: Path
) -> None:
    types = STATIC / "relay-stream.d.ts"
    options = {
        "strict": True,
        "noEmit": True,
        "target": "es2022",
        "module": "esnext",
        "moduleResolution": "bundler",
        "lib": ["es2022", "dom", "dom.iterable", "dom.asynciterable"],
        "types": [],
        "paths": {"relay-stream": [str(types)], "ai": [str(node_packages / "ai")]},
    }
    # Types of others are taken as they are, ours are not.
    for checked, skip in ((types, False), (ROOT / "tests" / "js" / "usage_example.ts", True)):
        project = {"compilerOptions": options | {"skipLibCheck": skip}, "files": [str(checked)]}
        (tmp_path / "tsconfig.json").write_text(json.dumps(project))
        outcome = run(node_packages / ".bin" / "tsc", "--project", tmp_path)
        assert outcome.returncode == 0, outcome.stdout


def test_what_the_module_exports_is_what_its_types_declare() -> None:
    module = f"import * as all from {json.dumps((STATIC / 'relay-stream.js').as_uri())};"
    outcome = run("node", "--input-type=module", "--eval", f"{module} console.log(Object.keys(all).join())")
    assert outcome.returncode == 0, outcome.stdout
    declared = {
        words[2].partition("(")[0].partition("<")[0]
        for line in (STATIC / "relay-stream.d.ts").read_text().splitlines()
        if (words := line.split())[:2] in (["export", "class"], ["export", "function"])
    }
    assert set(outcome.stdout.strip().split(",")) == declared


def test_the_package_holds_the_served_files_and_needs_nothing() -> None:
    package = json.loads((STATIC / "package.json").read_text())
    assert package["files"] == ["relay-stream.js", "relay-stream.d.ts"]
    assert not package.keys() & {"dependencies", "peerDependencies", "devDependencies", "scripts"}
    assert "import " not in "".join(
        line for line in (STATIC / "relay-stream.js").read_text().splitlines() if not line.startswith("//")
    )


def test_the_package_has_the_version_of_relay() -> None:
    package = json.loads((STATIC / "package.json").read_text())
    assert f'\nversion = "{package["version"]}"\n' in (ROOT / "pyproject.toml").read_text()
