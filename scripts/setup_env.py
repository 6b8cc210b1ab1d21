"""Make or update ``.venv`` from ``requirements.lock``, and ``.venv-lowest`` from pyproject.toml.

Standard library only, and no syntax newer than Python 3.6, so that an old Python prints what it
needs instead of a SyntaxError. Exit status: 0 done, 2 something the caller must change.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

MIN_PYTHON = (3, 11)  # requires-python in pyproject.toml

if sys.version_info < MIN_PYTHON:
    sys.stderr.write(
        "error: mnist-batchnorm needs Python >= {}.{}, this is {}.{}.{} ({}); "
        "name a newer one: make setup PYTHON=python3.12\n".format(
            *MIN_PYTHON, *sys.version_info[:3], sys.executable
        )
    )
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYPROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
LOWEST_VENV = ROOT / ".venv-lowest"
BIN = VENV / "bin"
STAMP = VENV / "setup.json"
DVC_LOCAL_CONFIG = ROOT / ".dvc" / "config.local"

# uv reads no pip configuration; these pip options have a uv variable with the same meaning.
PIP_TO_UV = {
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "trusted-host": "UV_INSECURE_HOST",
}

LOCKED_TORCH = "lock"  # TORCH_BACKEND's default: the build that requirements.lock has hashes of
TORCH = {"torch", "torchvision"}
TORCH_RUNTIME = re.compile(r"triton|cuda-.*|nvidia-.*")  # what a CUDA build of torch brings along


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that says what to change."""


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lock", action="store_true", help="re-resolve requirements.lock first")
    parser.add_argument("--upgrade", action="store_true", help="with --lock: newest versions")
    parser.add_argument("--lowest", action="store_true", help="make .venv-lowest too")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            resolve_lock(arguments.upgrade)
        set_up()
        if arguments.lowest:
            set_up_lowest()
    except (SetupError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def set_up() -> None:
    """Bring ``.venv`` to the state that the lock describes, unless its stamp says it is there."""
    recorded = read_stamp()
    wanted = {
        "lock": sha256(LOCK),
        "pyproject": sha256(PYPROJECT),
        "python": python_version(),
        "root": str(ROOT),  # scripts in .venv/bin hold absolute paths: a moved tree is made anew
        "torch": os.environ.get("TORCH_BACKEND") or recorded.get("torch", LOCKED_TORCH),
    }
    runs = (BIN / "python").exists()  # not where it links to a Python that has been removed
    if recorded != wanted or not runs:
        started = time.monotonic()
        prepare_uv()
        torch = torch_installation(wanted["torch"])
        write_stamp({"torch": wanted["torch"]})  # cut short from here on, the build stays chosen
        install(torch)
        write_stamp(wanted)
        report(f".venv is ready ({time.monotonic() - started:.0f} s)")
    match_dvc_to_git()


def resolve_lock(upgrade: bool) -> None:
    """Write ``requirements.lock`` for every platform and Python that pyproject.toml allows.

    Versions that are locked and still fit are kept, unless ``upgrade``.
    """
    prepare_uv()
    report("resolving requirements.lock")
    command = ["pip", "compile", PYPROJECT.name, "--group", "dev", "--all-extras"]
    command += ["--output-file", LOCK.name]
    command += ["--universal", "--python-version", "{}.{}".format(*MIN_PYTHON)]
    command += ["--generate-hashes", "--custom-compile-command", "make lock", "--quiet"]
    run_uv(command + ["--upgrade"] * upgrade)


def set_up_lowest() -> None:
    """Make ``.venv-lowest`` with the lowest version that pyproject.toml allows of each package.

    What these need in turn is the newest. Nothing is hash-checked, as there is no lock.
    """
    backend = read_stamp().get("torch", LOCKED_TORCH)
    torch = [] if backend == LOCKED_TORCH else ["--torch-backend", backend]
    target = uv_target(LOWEST_VENV / "bin" / "python")
    report(f"installing the lowest versions into {LOWEST_VENV.name}")
    run_uv(["venv", "--clear", *uv_target(), str(LOWEST_VENV)])
    requirements = ["--requirements", PYPROJECT.name, "--all-extras", "--group", "dev"]
    lowest = ["--resolution", "lowest-direct", *torch]
    run_uv(["pip", "install", *target, *requirements, *lowest])
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    run_uv(["pip", "install", *target, *editable])


def prepare_uv() -> None:
    """Make sure that ``.venv`` works and holds the uv that the lock names."""
    entries = [entry for entry in lock_entries() if name(entry) == "uv"]
    if not entries:
        raise SetupError(f"{LOCK} has no entry for uv: git checkout {LOCK.name}")
    if not venv_works():
        make_venv()
    version = requirement(entries[0]).partition("==")[2]
    if installed_uv() == version:
        return
    report(f"installing uv {version}")
    with requirements_file(entries) as path:
        pip = run_quietly(
            *(BIN / "python", "-m", "pip", "install", "--disable-pip-version-check"),
            *("--force-reinstall", "--no-deps", "--only-binary=:all:"),
            *("--require-hashes", "--requirement", path),
            PIP_USER="0",  # pip refuses a configured --user inside an environment
        )
    if pip.returncode:
        index = without_password(pip_options().get("index-url", "pip's default index"))
        raise SetupError(
            f"pip cannot get uv {version} from {index} ({pip_failure(pip.stdout)}); check the "
            "network or proxy, or name a mirror: make setup PIP_INDEX_URL=https://host/simple"
        )


def torch_installation(backend: str) -> list[str]:
    """Return the uv arguments that install another build of torch, none for the locked build.

    It is the locked version, from PyTorch's own index, and without a hash: the lock cannot know
    the hashes of every build.

    Raises:
        SetupError: there is no such build, or no way to PyTorch's index.
    """
    if backend == LOCKED_TORCH:
        return []
    packages = [entry for entry in lock_entries() if name(entry) in TORCH]
    arguments = ["pip", "install", *uv_target(), "--torch-backend", backend, "--compile-bytecode"]
    arguments += [f"--reinstall-package={name(entry)}" for entry in packages]
    arguments += [requirement(entry) for entry in packages]
    report(f"torch for {backend}: from PyTorch's own index, not hash-checked")
    run_uv([*arguments, "--dry-run"])  # what cannot be had must not cost the build that is there
    return arguments


def install(torch: list[str]) -> None:
    """Make the packages in ``.venv`` exactly the locked ones, plus this project (editable).

    Args:
        torch: uv arguments that install torch, empty where the locked build is wanted.
    """
    entries = lock_entries()
    if torch:
        entries = [entry for entry in entries if not is_torch_build(name(entry))]
    # uv takes an installed 2.15.0+cpu for the locked 2.15.0.
    other_builds = VENV.glob("lib/*/site-packages/torch*-*+*.dist-info")
    renew = [f"--reinstall-package={build.name.partition('-')[0]}" for build in other_builds]
    report(f"installing {LOCK.name} ({len(entries)} entries)")
    with requirements_file(entries) as path:
        # Without byte-code the first `import torch` of every process would take twice as long
        # where PYTHONDONTWRITEBYTECODE is set, as in many containers.
        checks = ["--require-hashes", "--compile-bytecode"]
        run_uv(["pip", "sync", *uv_target(), *renew, *checks, path])
    if torch:
        run_uv(torch)
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    run_uv(["pip", "install", *uv_target(), *editable])


def match_dvc_to_git() -> None:
    """Set DVC's ``core.no_scm`` in ``.dvc/config.local`` where there is no git work tree.

    DVC refuses to run there without it; in a work tree it would switch off what needs git
    (experiments, diffs), so it is removed again.
    """
    without_git = not any((folder / ".git").exists() for folder in (ROOT, *ROOT.parents))
    local = DVC_LOCAL_CONFIG.read_text() if DVC_LOCAL_CONFIG.exists() else ""
    configured = re.search(r"^\s*no_scm\s*=\s*true\s*$", local, re.MULTILINE) is not None
    if without_git == configured:
        return
    change = ["core.no_scm", "true"] if without_git else ["--unset", "core.no_scm"]
    report(f"dvc config --local {' '.join(change)}")
    dvc = run_quietly(BIN / "dvc", "config", "--local", *change)
    if dvc.returncode:
        raise SetupError(f"dvc config --local {' '.join(change)}: {last_line(dvc.stdout)}")


def make_venv() -> None:
    """Make an empty ``.venv`` with the Python that runs this, in place of what is there."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} has no venv module; on Debian or Ubuntu install "
            f"python{python_version()}-venv, or name another Python: make setup PYTHON=python3.12"
        )
    report(f"making .venv with Python {sys.version.split()[0]}")
    venv = run_quietly(sys.executable, "-m", "venv", "--clear", VENV)
    if venv.returncode:
        raise SetupError(f"{sys.executable} -m venv failed: {last_line(venv.stdout)}")


def venv_works() -> bool:
    """Tell whether ``.venv`` has this Python's version, lies where it was made, and runs pip."""
    try:
        pip = run_quietly(BIN / "pip", "--version")
    except OSError:
        return False
    found = re.search(r" from (.+) \(python (\d+\.\d+)\)", pip.stdout)
    return (
        found is not None
        and found.group(2) == python_version()
        and Path(found.group(1)).resolve().is_relative_to(VENV.resolve())
    )


def installed_uv() -> str | None:
    """Return the version of the uv in ``.venv``, None where there is none that runs."""
    try:
        uv = run_quietly(BIN / "uv", "--version")
    except OSError:
        return None
    found = re.match(r"uv (\S+)", uv.stdout)
    return found.group(1) if found else None


def run_uv(arguments: Iterable[str]) -> None:
    """Run the environment's uv at the repository root, showing its output.

    Raises:
        SetupError: uv failed; what it printed says why.
    """
    command = [str(BIN / "uv"), *arguments]
    environment = uv_environment(os.environ, pip_options())
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise SetupError(
            f"`uv {' '.join(command[1:3])}` failed for the reason above; docs/install.md has the "
            "usual causes, and make setup goes on from here"
        )


def uv_target(python: Path | None = None) -> list[str]:
    """Return the uv options that name an environment, quiet where the output goes to a log."""
    return [
        "--python",
        str(python or BIN / "python"),
        *([] if sys.stderr.isatty() else ["--quiet"]),
    ]


def uv_environment(environ: Mapping[str, str], pip: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for uv: ``environ``, completed by what pip is configured with.

    Extra indexes are handed over only beside a main index. They mean as much to uv as to pip then:
    any index may serve a version, and the hashes decide whether the file is the right one. Beside
    the public index, which has every locked package, they could only hide files of it.
    """
    complete = dict(environ)
    complete.pop("UV_TORCH_BACKEND", None)  # builds that the lock has no hashes of
    for option, variable in PIP_TO_UV.items():
        if option in pip:
            complete.setdefault(variable, " ".join(pip[option].split()))  # pip: one host a line
    own_index = {"UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX"} & environ.keys()
    if "index-url" in pip and not own_index:
        # uv asks UV_INDEX first, in order, and the default index last.
        *first, last = pip["index-url"], *pip.get("extra-index-url", "").split()
        complete["UV_DEFAULT_INDEX"] = last
        if first:
            complete["UV_INDEX"] = " ".join(first)
            complete.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return complete


def pip_options() -> dict[str, str]:
    """Return the options that ``pip install`` in ``.venv`` takes from its files and environment."""
    listing = run_quietly(BIN / "python", "-m", "pip", "config", "list").stdout
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in by_section:
            by_section[section][option] = ast.literal_eval(value)
    return {option: value for part in by_section.values() for option, value in part.items()}


def pip_failure(output: str) -> str:
    """Return the reason in pip's output: the network's, where there is one, else pip's error."""
    broken = re.findall(r"connection broken by '(.+)': /", output)
    if broken:
        return re.sub(r"<[^>]*>: ", "", broken[-1])  # without the address of a Python object
    errors = re.findall(r"^ERROR: (.+)", output, re.MULTILINE)
    return errors[0] if errors else last_line(output)


def lock_entries() -> list[str]:
    """Return the entries of the lock, each with its marker, hashes and comments."""
    return re.findall(r"^[a-z0-9].*(?:\n .*)*", LOCK.read_text(), re.MULTILINE)


def name(entry: str) -> str:
    """Return the package name of a lock entry."""
    return entry.partition("==")[0]


def requirement(entry: str) -> str:
    """Return a lock entry's requirement without its hashes: ``torch==2.15.0 ; marker``."""
    return entry.splitlines()[0].rstrip("\\ ")


def is_torch_build(package: str) -> bool:
    """Tell whether a package is part of one particular build of torch."""
    return package in TORCH or TORCH_RUNTIME.fullmatch(package) is not None


@contextlib.contextmanager
def requirements_file(entries: Iterable[str]) -> Iterator[str]:
    """Yield the path of a temporary requirements file that holds ``entries``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.txt")
        path.write_text("\n".join([*entries, ""]))
        yield str(path)


def read_stamp() -> dict[str, str]:
    """Return what the last set-up recorded, nothing where there was none or it was cut short."""
    try:
        recorded: dict[str, str] = json.loads(STAMP.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return recorded


def write_stamp(state: Mapping[str, str]) -> None:
    """Record the state of ``.venv``."""
    STAMP.write_text(json.dumps(state, indent=2) + "\n")


def run_quietly(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository root, with ``environ`` added; ``stdout`` has all output."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def report(message: str) -> None:
    """Print one line of progress."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


def python_version() -> str:
    """Return the running Python's version to the minor number, as in ``3.11``."""
    return "{}.{}".format(*sys.version_info[:2])


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_line(output: str) -> str:
    """Return the last line of a program's output that is not empty."""
    lines = output.strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"


def without_password(url: str) -> str:
    """Return a URL without the user and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)


if __name__ == "__main__":
    sys.exit(main())
