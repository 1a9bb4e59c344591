"""Style is itself a test: the rules of DESIGN section 9 and of STYLE, each shown to catch a bad sample.

A rule is a function of a tree's root. It returns what is wrong, one line each, as `path:line: what`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CORE = {
    "errors",
    "limits",
    "settings",
    "cursor",
    "frame",
    "sse",
    "ndjson",
    "headers",
    "lifecycle",
    "counts",
    "trace",
}
IMPURE = {
    "asyncio",
    "time",
    "random",
    "secrets",
    "os",
    "socket",
    "redis",
    "sqlite3",
    "starlette",
    "uvicorn",
    "aiohttp",
    "prometheus_client",
}
STORES = {"redis", "sqlite3"}
WEB = {"starlette", "uvicorn", "aiohttp"}

# Modules whose tests are elsewhere: the interface of the journal is the contract suite's subject.
COVERED_BY = {"relay/journal/base.py": "tests/contract", "relay/__main__.py": "tests/test_cli.py"}

NAMES_OF_NOTHING = {"utils", "helpers", "manager", "common"}

# Put together, so that this file does not hold them.
LEFTOVER = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
PATHS = ["/".join(parts) for parts in (("", "work", ""), ("", "root", ""), ("", "tmp", "venv"))]
HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("registry", "npmjs"))]
PLACES = PATHS + HOSTS


# --- what the rules read ------------------------------------------------------------------------------


def python_files(root: Path, *folders: str) -> list[Path]:
    """Python files of these folders, in order."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def committed(root: Path) -> list[Path]:
    """Files git has or would take, since a rule should bite before the commit. Without git, all files."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True
    )
    if listing.returncode == 0:
        paths = [root / name for name in listing.stdout.decode().split("\0") if name]
    else:
        paths = [path for path in root.rglob("*") if not path.relative_to(root).parts[0].startswith(".")]
    return sorted(path for path in paths if path.is_file())


def lines(root: Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, text) of every line of every committed text file."""
    for path in committed(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            yield f"{path.relative_to(root)}:{number}", line


def module_name(path: Path, root: Path) -> str:
    """`relay.journal.base` of `relay/journal/base.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, full module name) of every import in a file, wherever it stands, also of `from` parts
    that are modules themselves."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [
                f"{base}.{alias.name}" if is_module(root, f"{base}.{alias.name}") else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield f"{path.relative_to(root)}:{node.lineno}", name


def is_module(root: Path, name: str) -> bool:
    place = root.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def is_core(name: str) -> bool:
    parts = name.split(".")
    return parts == ["relay"] or (parts[0] == "relay" and (parts[1] in CORE or parts[1] == "dialects"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# --- the rules ----------------------------------------------------------------------------------------


def impure_core(root: Path) -> list[str]:
    """The core does no I/O, reads no clock and throws no dice, and knows no shell."""
    return [
        f"{place}: core imports {name}"
        for path in python_files(root, "relay")
        if is_core(module_name(path, root))
        for place, name in imports(path, root)
        if name.split(".")[0] in IMPURE or (within(name, "relay") and not is_core(name))
    ]


def journal_reaching_out(root: Path) -> list[str]:
    """A journal knows the core and its own store, not who writes to it, reads it, or serves it."""
    return [
        f"{place}: the journal imports {name}"
        for path in python_files(root, "relay/journal")
        for place, name in imports(path, root)
        if name.split(".")[0] in WEB
        or (within(name, "relay") and not is_core(name) and not within(name, "relay.journal"))
    ]


def ingest_and_replay_reaching_out(root: Path) -> list[str]:
    """`ingest` and `replay` know the core and the journal's interface; never each other, never a backend."""
    return [
        f"{place}: {package} imports {name}"
        for package in ("ingest", "replay")
        for path in python_files(root, f"relay/{package}")
        for place, name in imports(path, root)
        if name.split(".")[0] in STORES
        or (
            within(name, "relay")
            and not is_core(name)
            and name not in ("relay.journal", "relay.journal.base")
            and not within(name, f"relay.{package}")
        )
    ]


def modules_without_tests(root: Path) -> list[str]:
    """`relay/a/b.py` is tested by `tests/a/test_b.py`; the exceptions are listed above, none is core."""
    wrong = []
    for path in python_files(root, "relay"):
        name = path.relative_to(root)
        if path.name == "__init__.py":
            continue
        mirrored = Path("tests", *name.parts[1:-1], f"test_{path.name}")
        test = Path(COVERED_BY.get(name.as_posix(), mirrored))
        if not (root / test).exists():
            wrong.append(f"{name}: {test} is missing")
    return wrong


def core_covered_elsewhere(covered_by: dict[str, str]) -> list[str]:
    """A core module is fully tested by its own test file."""
    return [name for name in covered_by if is_core(name.removesuffix(".py").replace("/", "."))]


def leftovers(root: Path) -> list[str]:
    """What is left to do is an issue, not a comment."""
    return [f"{place}: {found[0]}" for place, line in lines(root) if (found := LEFTOVER.search(line))]


def places_of_one_machine(root: Path) -> list[str]:
    """No path of a developer's machine and no package registry's host is written down."""
    return [f"{at}: holds {place}" for at, line in lines(root) for place in PLACES if place in line]


def code_in_init_files(root: Path) -> list[str]:
    """`__init__.py` files are empty."""
    files = python_files(root, "relay", "tests", "benchmarks")
    return [
        f"{path.relative_to(root)}: not empty"
        for path in files
        if path.name == "__init__.py" and path.read_bytes()
    ]


def names_of_nothing(root: Path) -> list[str]:
    """A file is named for the one noun it holds."""
    files = python_files(root, "relay", "tests", "benchmarks")
    return [
        f"{name}: says nothing of what it holds"
        for name in (path.relative_to(root) for path in files)
        if NAMES_OF_NOTHING & {part.removeprefix("test_") for part in name.with_suffix("").parts}
    ]


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Compound = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match


def undocumented(root: Path) -> list[str]:
    """Public classes, functions and methods say what they are for.

    Not needed where it would only repeat the code: dunders, bodies of one statement, classes of nothing but
    assignments, and methods that a protocol of relay's own documents.
    """
    trees = {path: ast.parse(path.read_text()) for path in python_files(root, "relay")}
    promised = {
        method.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
        for method in node.body
        if isinstance(method, Definition) and ast.get_docstring(method)
    }
    return [
        f"{path.relative_to(root)}:{node.lineno}: {node.name} has no docstring"
        for path, tree in trees.items()
        for node, is_method in public_definitions(tree)
        if not (ast.get_docstring(node) or says_it_itself(node) or (is_method and node.name in promised))
    ]


def public_definitions(parent: ast.Module | ast.ClassDef) -> Iterator[tuple[Definition, bool]]:
    """What others may use of a module, and whether it is a method; not what functions define inside."""
    for node in parent.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node, isinstance(parent, ast.ClassDef)
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def says_it_itself(node: Definition) -> bool:
    if isinstance(node, ast.ClassDef):
        return all(isinstance(statement, ast.Assign | ast.AnnAssign | ast.Pass) for statement in node.body)
    return len(node.body) == 1 and not isinstance(node.body[0], Compound)


def tool_complaints(*command: str) -> str:
    """What a tool run by this Python complains of; empty when it passes."""
    outcome = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return outcome.stdout + outcome.stderr if outcome.returncode else ""


# --- the tree keeps them ------------------------------------------------------------------------------


def test_the_core_is_pure() -> None:
    assert impure_core(ROOT) == []


def test_a_journal_knows_only_the_core_and_its_store() -> None:
    assert journal_reaching_out(ROOT) == []


def test_ingest_and_replay_know_the_journal_only_by_its_interface() -> None:
    assert ingest_and_replay_reaching_out(ROOT) == []


def test_every_module_has_its_test_file() -> None:
    assert modules_without_tests(ROOT) == []


def test_no_core_module_is_tested_elsewhere_only() -> None:
    assert core_covered_elsewhere(COVERED_BY) == []


def test_nothing_is_left_to_do_in_a_comment() -> None:
    assert leftovers(ROOT) == []


def test_no_file_names_a_registry_or_a_place_of_one_machine() -> None:
    assert places_of_one_machine(ROOT) == []


def test_init_files_are_empty() -> None:
    assert code_in_init_files(ROOT) == []


def test_every_module_is_named_for_what_it_holds() -> None:
    assert names_of_nothing(ROOT) == []


def test_what_is_public_has_a_docstring() -> None:
    assert undocumented(ROOT) == []


def test_ruff_passes() -> None:
    assert tool_complaints("ruff", "check", ".") == ""


def test_mypy_passes() -> None:
    assert tool_complaints("mypy") == ""


# --- and would not pass without ------------------------------------------------------------------------


def sample(root: Path, path: str, text: str = "") -> Path:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


@pytest.mark.parametrize("module", ["relay/cursor.py", "relay/ndjson.py", "relay/dialects/raw.py"])
@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "import os.path",
        "from redis.asyncio import Redis",
        "from relay.journal.base import Frame",
        "from relay import metrics",
        "def f():\n    import asyncio",
    ],
)
def test_an_impure_core_is_caught(tmp_path: Path, module: str, line: str) -> None:
    sample(tmp_path, "relay/metrics.py")
    sample(tmp_path, module, line)
    assert len(impure_core(tmp_path)) == 1


def test_a_relative_import_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    sample(tmp_path, "relay/metrics.py")
    sample(tmp_path, "relay/dialects/raw.py", "from .. import metrics, errors\nfrom . import base\n")
    sample(tmp_path, "relay/dialects/base.py")
    assert impure_core(tmp_path) == ["relay/dialects/raw.py:1: core imports relay.metrics"]


def test_what_the_core_may_import_is_let_pass(tmp_path: Path) -> None:
    kept = "import orjson\nfrom relay.cursor import Cursor\nimport relay.dialects.raw\n"
    sample(tmp_path, "relay/frame.py", kept)
    sample(tmp_path, "relay/server.py", "import asyncio")
    assert impure_core(tmp_path) == []


@pytest.mark.parametrize(
    "line", ["import relay.ingest.writer", "from relay.metrics import M", "import aiohttp"]
)
def test_a_journal_reaching_out_is_caught(tmp_path: Path, line: str) -> None:
    sample(tmp_path, "relay/journal/sqlite.py", f"import sqlite3\nfrom relay.journal.base import J\n{line}\n")
    assert len(journal_reaching_out(tmp_path)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from relay.replay.tail import Tail",
        "from relay.journal.sqlite import SqliteJournal",
        "from relay.journal import redis_streams",
        "from relay.metrics import Metrics",
        "import sqlite3",
    ],
)
def test_ingest_reaching_out_is_caught(tmp_path: Path, line: str) -> None:
    sample(tmp_path, "relay/journal/redis_streams.py")
    sample(tmp_path, "relay/journal/base.py")
    kept = "from relay.journal import base\nfrom relay.ingest.writer import Writer\nimport relay.sse\n"
    sample(tmp_path, "relay/ingest/push.py", kept + line)
    assert len(ingest_and_replay_reaching_out(tmp_path)) == 1


def test_replay_importing_ingest_is_caught(tmp_path: Path) -> None:
    sample(tmp_path, "relay/replay/tail.py", "import relay.ingest.writer")
    assert ingest_and_replay_reaching_out(tmp_path) == [
        "relay/replay/tail.py:1: replay imports relay.ingest.writer"
    ]


def test_a_module_without_its_test_file_is_caught(tmp_path: Path) -> None:
    sample(tmp_path, "relay/__init__.py")
    sample(tmp_path, "relay/cursor.py")
    sample(tmp_path, "tests/test_cursor.py")
    sample(tmp_path, "relay/journal/base.py")
    sample(tmp_path, "relay/replay/tail.py")
    assert modules_without_tests(tmp_path) == [
        "relay/journal/base.py: tests/contract is missing",
        "relay/replay/tail.py: tests/replay/test_tail.py is missing",
    ]


def test_a_core_module_tested_elsewhere_is_caught() -> None:
    assert core_covered_elsewhere({"relay/sse.py": "tests/x", "relay/app.py": "tests/y"}) == ["relay/sse.py"]


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "X" * 3])
def test_a_leftover_is_caught(tmp_path: Path, word: str) -> None:
    sample(tmp_path, "relay/journal/lua/append.lua", f"ok = 1\n-- {word}: later\n")
    assert leftovers(tmp_path) == [f"relay/journal/lua/append.lua:2: {word}"]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_of_one_machine_is_caught(tmp_path: Path, place: str) -> None:
    sample(tmp_path, "README.md", f"see {place}x\n")
    assert places_of_one_machine(tmp_path) == [f"README.md:1: holds {place}"]


def test_a_file_that_git_ignores_is_not_looked_at(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    sample(tmp_path, ".gitignore", "kept-out\n")
    sample(tmp_path, "kept-out", PLACES[0])
    sample(tmp_path, "new-file", PLACES[0])
    assert places_of_one_machine(tmp_path) == [f"new-file:1: holds {PLACES[0]}"]


def test_code_in_an_init_file_is_caught(tmp_path: Path) -> None:
    sample(tmp_path, "relay/__init__.py")
    sample(tmp_path, "relay/journal/__init__.py", "x = 1\n")
    assert code_in_init_files(tmp_path) == ["relay/journal/__init__.py: not empty"]


@pytest.mark.parametrize(
    "path", ["relay/utils.py", "relay/common/x.py", "tests/helpers.py", "tests/test_manager.py"]
)
def test_a_name_of_nothing_is_caught(tmp_path: Path, path: str) -> None:
    sample(tmp_path, path)
    assert len(names_of_nothing(tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    y = x\n    return y",
        "async def f(x):\n    y = x\n    return y",
        "def f(x):\n    if x:\n        return 1",
        "class C:\n    def _m(self): ...",
        'class C:\n    """Doc."""\n    def m(self):\n        x = 1\n        return x',
    ],
)
def test_what_is_public_without_a_docstring_is_caught(tmp_path: Path, text: str) -> None:
    sample(tmp_path, "relay/x.py", text)
    assert len(undocumented(tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def _f(x):\n    y = x\n    return y",
        "def f(x):\n    return x",
        "class C(E):\n    a = 1\n    b: int = 2",
        'class C:\n    """Doc."""\n    def __init__(self, x):\n        self.x = x\n        self.y = x',
        'def f():\n    """Doc."""\n    def g():\n        x = 1\n        return x\n    return g',
        'class P(Protocol):\n    """Doc."""\n    def m(self):\n        """Doc."""\n'
        'class C:\n    """Doc."""\n    def m(self):\n        x = 1\n        return x',
    ],
)
def test_what_needs_no_docstring_is_let_pass(tmp_path: Path, text: str) -> None:
    sample(tmp_path, "relay/x.py", text)
    assert undocumented(tmp_path) == []


def test_ruff_complains_of_a_bad_sample(tmp_path: Path) -> None:
    bad = sample(tmp_path, "bad.py", "import os\n")
    config = str(ROOT / "pyproject.toml")
    assert "F401" in tool_complaints("ruff", "check", "--no-cache", "--config", config, str(bad))


def test_mypy_complains_of_a_bad_sample(tmp_path: Path) -> None:
    bad = sample(tmp_path, "bad.py", "def f(x):\n    return x\n")
    complaints = tool_complaints("mypy", "--cache-dir", str(tmp_path / "cache"), str(bad))
    assert "no-untyped-def" in complaints
