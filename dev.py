"""Everything a contributor runs, from a machine that has only Python 3.11.

    python3 dev.py demo  [args]   install relay into .venv and run `relay demo`
    python3 dev.py test  [args]   install what the tests need, then run pytest
    python3 dev.py check          ruff, mypy, and the style tests
    python3 dev.py bench [args]   run the benchmarks
    python3 dev.py soak  [args]   run the model test, the faults, then requests made up from the API's
                                  description, each for --seconds (600), from --seed on; `soak model`,
                                  `soak faults` or `soak api` runs one of them
    python3 dev.py setup          install everything the commands above need, and run nothing

Only the standard library is used, and the syntax stays readable to older Pythons, so that one of them
gets the sentence below and not a traceback.
"""

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"relay needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable}).\n"
        f"Run this with a newer one, for example: python3.12 dev.py {' '.join(sys.argv[1:])}"
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "relay-stamp"
JS = ROOT / "tests" / "js"
JS_STAMP = JS / "node_modules" / "relay-stamp"
FUZZER = VENV / "fuzzer"
FUZZER_STAMP = FUZZER / "relay-stamp"
FUZZER_NEEDS = ROOT / "tests" / "conformance" / "fuzzer" / "requirements.txt"

# Half as many workers again as there are cores, because tests wait for processes more than they compute; each
# starts with a contiguous part of the tests, so module fixtures are made once or twice, and takes from the
# others when done. `-n 0` after it turns this off.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = CORES + max(1, CORES // 2)
PYTEST = (str(PYTHON), "-m", "pytest", "-n", str(WORKERS), "--dist", "worksteal")

SOAKS = {
    "model": "tests/model/soak.py",
    "faults": "tests/faults/soak.py",
    "api": "tests/conformance/soak.py",
}


class Tool(NamedTuple):
    """A program the tests run, and what the system's package managers call it."""

    name: str
    binaries: tuple[str, ...]
    packages: dict[str, tuple[str, ...]]


REDIS = Tool(
    "redis-server",
    ("redis-server",),
    {"apt-get": ("redis-server",), "brew": ("redis",), "dnf": ("redis",), "apk": ("redis",)},
)
CHROMIUM = Tool(
    "chromium",
    (
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    ),
    {
        "apt-get": ("chromium",),
        "brew": ("--cask", "chromium"),
        "dnf": ("chromium",),
        "apk": ("chromium",),
    },
)
NODE = Tool(
    "node",
    ("node",),
    {"apt-get": ("nodejs",), "brew": ("node",), "dnf": ("nodejs",), "apk": ("nodejs",)},
)
NPM = Tool(
    "npm",
    ("npm",),
    {"apt-get": ("npm",), "brew": ("node",), "dnf": ("nodejs-npm",), "apk": ("npm",)},
)
NGINX = Tool(
    "nginx",
    ("nginx", "/usr/sbin/nginx"),
    {"apt-get": ("nginx",), "brew": ("nginx",), "dnf": ("nginx",), "apk": ("nginx",)},
)
CURL = Tool(
    "curl",
    ("curl",),
    {"apt-get": ("curl",), "brew": ("curl",), "dnf": ("curl",), "apk": ("curl",)},
)
OPENSSL = Tool(
    "openssl",
    ("openssl",),
    {"apt-get": ("openssl",), "brew": ("openssl",), "dnf": ("openssl",), "apk": ("openssl",)},
)
PROMETHEUS = Tool(
    "prometheus",
    ("promtool",),
    {
        "apt-get": ("prometheus",),
        "brew": ("prometheus",),
        "dnf": ("golang-github-prometheus",),
        "apk": ("prometheus",),
    },
)
CADDY = Tool(
    "caddy",
    ("caddy",),
    {"apt-get": ("caddy",), "brew": ("caddy",), "dnf": ("caddy",), "apk": ("caddy",)},
)

# Debian starts them as services of the same names.
SERVICES = (REDIS, NGINX, PROMETHEUS, CADDY)

INSTALL = {
    "apt-get": ("apt-get", "install", "-y", "-q", "--no-install-recommends"),
    "brew": ("brew", "install"),
    "dnf": ("dnf", "install", "-y", "-q"),
    "apk": ("apk", "add", "-q"),
}
REFRESH = {"apt-get": ("apt-get", "update", "-q"), "apk": ("apk", "update", "-q")}


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def stop(text: str) -> NoReturn:
    say(text)
    sys.exit(1)


def run(*command: str) -> int:
    return subprocess.run(command, cwd=ROOT).returncode


def become(*command: str) -> NoReturn:
    os.chdir(ROOT)
    os.execv(command[0], command)


# --- the virtual environment --------------------------------------------------------------------------


def wanted_stamp(extra: str) -> str:
    """What a finished .venv was made from. Its scripts and its editable install hold ROOT's path, so a
    moved tree is stale too. The extra stands last: an environment with it serves those who need none."""
    recipe = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"{interpreter()}\n{recipe}\n{extra}"


def interpreter() -> str:
    return f"python {sys.version_info[0]}.{sys.version_info[1]} in {ROOT}"


def ready(extra: str) -> bool:
    return STAMP.is_file() and STAMP.read_text().startswith(wanted_stamp(extra)) and works()


def works() -> bool:
    """Whether .venv's Python still runs: the one it was made from may have been removed."""
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    try:
        return subprocess.run([PYTHON, "-c", check], capture_output=True).returncode == 0
    except OSError:
        return False


def ensure_venv(extra: str = "") -> None:
    if ready(extra):
        return
    if Path(sys.prefix).resolve() == VENV:
        # Started by the very Python that is to be replaced: go on with the one it was made from.
        base = str(getattr(sys, "_base_executable", sys.executable))
        if Path(base) != Path(sys.executable):
            os.execv(base, [base, *sys.argv])
    # The stamp is written last and removed first: without it, .venv is half-made or not ours.
    kept = STAMP.is_file() and STAMP.read_text().startswith(interpreter()) and works()
    STAMP.unlink(missing_ok=True) if VENV.is_dir() else VENV.unlink(missing_ok=True)
    if not kept:
        say(f"making .venv with Python {sys.version.split()[0]}")
        ensure_ensurepip()
        if run(sys.executable, "-m", "venv", "--clear", str(VENV)) != 0:
            stop(f"could not make {VENV}; the lines above say why. Remove it and try again.")
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    say("installing relay" + (f" and what {extra} needs" if extra else ""))
    if run(str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-e", target) != 0:
        stop("pip could not install relay; the lines above say why. The next run starts afresh.")
    STAMP.write_text(wanted_stamp(extra))


def ensure_ensurepip() -> None:
    """Debian ships Python without ensurepip, in a package of its own for each version."""
    if importlib.util.find_spec("ensurepip") is not None:
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if shutil.which("apt-get") is None:
        stop("this Python has no ensurepip, so it cannot make a .venv; install the package that brings it")
    install("apt-get", package)
    importlib.invalidate_caches()
    if importlib.util.find_spec("ensurepip") is None:
        stop(f"{package} is installed, but {sys.executable} still has no ensurepip; use another Python")


# --- the system's packages ----------------------------------------------------------------------------


def found(tool: Tool) -> bool:
    return any(shutil.which(binary) for binary in tool.binaries)


def ensure_tools(*tools: Tool) -> None:
    missing = [tool for tool in tools if not found(tool)]
    if not missing:
        return
    manager = next((name for name in INSTALL if shutil.which(name)), None)
    names = " and ".join(tool.name for tool in missing)
    if manager is None:
        stop(f"the tests need {names}, and there is no apt-get, brew, dnf or apk here; install by hand")
    for tool in missing:
        install(manager, *tool.packages[manager])
        if tool in SERVICES and manager == "apt-get":
            stop_new_service(tool.name)
        if not found(tool):
            stop(f"{manager} installed a package for {tool.name}, but none of its programs is on the PATH")


def install(manager: str, *packages: str) -> None:
    """Install packages, refreshing the lists only when it does not work without. Stops with the exact
    command where this account may not install."""
    command = (*INSTALL[manager], *packages)
    say(f"installing {' '.join(packages)} with {manager}")
    code, output = as_root(manager, *command)
    if code != 0 and manager in REFRESH:
        as_root(manager, *REFRESH[manager])
        code, output = as_root(manager, *command)
    if code != 0:
        print(output, file=sys.stderr)
        by_hand = " ".join((*sudo(manager), *command))
        stop(f"that did not work. Run this yourself, then try again:\n\n    {by_hand}\n")


def sudo(manager: str, *flags: str) -> tuple[str, ...]:
    return () if manager == "brew" or os.geteuid() == 0 else ("sudo", *flags)


def as_root(manager: str, *command: str) -> tuple[int, str]:
    """Run a package manager's command without questions; its exit code and what it printed. RUNLEVEL keeps
    Debian's packages from starting their services (where there is no systemd)."""
    full = [*sudo(manager, "-n"), "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", *command]
    try:
        outcome = subprocess.run(full, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        return 127, f"there is no {full[0]} here, and this account is not root"
    return outcome.returncode, outcome.stdout


def stop_new_service(name: str) -> None:
    """The tests start servers of their own. systemd starts a freshly installed one whatever RUNLEVEL says."""
    if Path("/run/systemd/system").is_dir() and shutil.which("systemctl"):
        as_root("systemctl", "systemctl", "disable", "--now", name)


# --- the JavaScript SDKs that the tests try ------------------------------------------------------------


def ensure_node_packages() -> None:
    """What tests/js/package-lock.json names, beside it. No package's own programs are run."""
    wanted = hashlib.sha256((JS / "package-lock.json").read_bytes()).hexdigest()
    if JS_STAMP.is_file() and JS_STAMP.read_text() == wanted:
        return
    say("installing the JavaScript packages that the tests try")
    flags = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--loglevel=error")
    # Not `npm ci`, which asks for other systems' packages too, and not every registry has them all.
    if run("npm", "install", "--no-save", "--prefix", str(JS), *flags) != 0:
        stop("npm could not install them; the lines above say why. The next run starts afresh.")
    JS_STAMP.write_text(wanted)


# --- the fuzzer of the API -----------------------------------------------------------------------------


def ensure_fuzzer() -> None:
    """schemathesis in an environment of its own: what it needs of others does not fit our other tests."""
    recipe = hashlib.sha256(FUZZER_NEEDS.read_bytes()).hexdigest()
    wanted = f"{interpreter()}\n{recipe}\n"
    if FUZZER_STAMP.is_file() and FUZZER_STAMP.read_text() == wanted:
        return
    say("installing the fuzzer of the API")
    python = str(FUZZER / "bin" / "python")
    if run(sys.executable, "-m", "venv", "--clear", str(FUZZER)) != 0 or run(
        *(python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", str(FUZZER_NEEDS))
    ):
        stop("pip could not install it; the lines above say why. The next run starts afresh.")
    FUZZER_STAMP.write_text(wanted)


# --- the commands -------------------------------------------------------------------------------------


def demo(args: list[str]) -> int:
    ensure_venv()
    become(str(VENV / "bin" / "relay"), "demo", *args)


def setup(args: list[str]) -> int:
    ensure_venv("test")
    ensure_tools(REDIS, CHROMIUM, NODE, NPM, NGINX, CURL, OPENSSL, PROMETHEUS, CADDY)
    ensure_node_packages()
    ensure_fuzzer()
    return 0


def test(args: list[str]) -> int:
    setup([])
    become(*PYTEST, *args)


def check(args: list[str]) -> int:
    ensure_venv("test")
    python = str(PYTHON)
    for command in (("ruff", "check", "."), ("mypy",), ("pytest", "-q", "tests/test_style.py")):
        code = run(python, "-m", *command)
        if code != 0:
            return code
    return 0


def bench(args: list[str]) -> int:
    setup([])
    become(str(PYTHON), "-m", "benchmarks", *args)


def soak(args: list[str]) -> int:
    ensure_venv("test")
    ensure_tools(REDIS)
    kinds = [args.pop(0)] if args and args[0] in SOAKS else list(SOAKS)
    if "api" in kinds:
        ensure_fuzzer()
    for kind in kinds:
        code = run(str(PYTHON), SOAKS[kind], *args)
        if code != 0:
            return code
    return 0


COMMANDS = {"demo": demo, "test": test, "check": check, "bench": bench, "soak": soak, "setup": setup}


def main() -> int:
    if os.name != "posix":
        stop("relay is developed on Linux and macOS; on Windows use WSL")
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        if not sys.argv[1:] or sys.argv[1] in ("-h", "--help", "help"):
            return 0 if sys.argv[1:] else 2
        stop(f"there is no command {sys.argv[1]!r}")
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
