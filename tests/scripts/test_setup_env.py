"""scripts/setup_env.py, the Makefile, and the files that set-up and CI go by.

Nothing here installs the locked packages (6 GB); `make test` has just done that.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/setup_env.py"
MAKEFILE = ROOT / "Makefile"
LOCK = (ROOT / "requirements.lock").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS: dict[str, dict[str, str]] = {
    "linux x86-64": {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
    "linux arm64": {"sys_platform": "linux", "platform_machine": "aarch64", "os_name": "posix"},
    "macOS": {"sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what set-up reads, in a folder outside git whose name has a space."""
    tree = tmp_path / "a copy"
    (tree / "scripts").mkdir(parents=True)
    for path in (SCRIPT, MAKEFILE, ROOT / "requirements.lock", ROOT / "pyproject.toml"):
        shutil.copy(path, tree / path.relative_to(ROOT))
    return tree


@pytest.fixture
def setup_env(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The copy's script as a module: everything it touches lies in the copy."""
    for variable in ("TORCH_BACKEND", "UV_TORCH_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("setup_env", tree / "scripts/setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    # `make test` hands its own flags down, and a make inside make says which folder it is in
    inherited = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# --- a Python that cannot do it, an index that is not there -------------------------------------


def test_python_bounds_agree(setup_env: ModuleType) -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=" + ".".join(
        str(number) for number in setup_env.MIN_PYTHON
    )


def test_script_has_no_syntax_newer_than_the_pythons_it_turns_away() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("version", ["3.6.15", "3.10.13"])
def test_old_python_is_told_so_in_one_line(tree: Path, version: str) -> None:
    fake = tuple(int(number) for number in version.split("."))
    code = (
        f"import sys, runpy; sys.version_info = {fake}; "
        "runpy.run_path('scripts/setup_env.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", code, cwd=tree)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: mnist-batchnorm needs Python >= 3.11, this is {version} ")
    assert "PYTHON=" in line
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_python_without_venv_is_told_so_in_one_line(tree: Path, module: str) -> None:
    code = (
        f"import sys, runpy; sys.modules[{module!r}] = None; "
        "runpy.run_path('scripts/setup_env.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", code, cwd=tree)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "has no venv module" in line
    assert f"install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in line
    assert not (tree / ".venv").exists()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections for as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_unreachable_index_is_one_line_without_the_password(tree: Path, closed_port: int) -> None:
    done = run(
        sys.executable,
        "scripts/setup_env.py",
        cwd=tree,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL=f"http://user:secret@127.0.0.1:{closed_port}/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="1",
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("setup: "))
    assert re.match(r"error: pip cannot get uv \d\S+ from http://127\.0\.0\.1:\d+/simple ", line)
    assert "Connection refused" in line
    assert "PIP_INDEX_URL=" in line
    assert "secret" not in done.stderr
    assert not (tree / ".venv/setup.json").exists()


REFUSED_PIP_23 = (
    "WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after "
    "connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPConnection "
    "object at 0x7fcd43f63cd0>: Failed to establish a new connection: [Errno 111] Connection "
    "refused')': /simple/uv/\n"
)
NONE_FOUND = (
    "ERROR: Could not find a version that satisfies the requirement uv==0.13.9 (from versions: "
    "none)\nERROR: No matching distribution found for uv==0.13.9\n"
)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            REFUSED_PIP_23 + NONE_FOUND,
            "NewConnectionError('Failed to establish a new connection: [Errno 111] Connection "
            "refused')",
        ),
        (
            NONE_FOUND,
            "Could not find a version that satisfies the requirement uv==0.13.9 (from versions: "
            "none)",
        ),
        ("Killed\n", "Killed"),
        ("", "it printed nothing"),
    ],
)
def test_reason_of_pips_failure(setup_env: ModuleType, output: str, reason: str) -> None:
    assert setup_env.pip_failure(output) == reason


# --- when something is installed ----------------------------------------------------------------


@pytest.fixture
def installed(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What reached uv: each call's arguments, requirements files replaced by what they hold."""
    calls: list[list[str]] = []

    def record(arguments: list[str]) -> None:
        calls.append(
            [Path(word).read_text() if word.endswith(".txt") else word for word in arguments]
        )

    def prepare() -> None:
        setup_env.BIN.mkdir(parents=True, exist_ok=True)
        (setup_env.BIN / "python").unlink(missing_ok=True)
        (setup_env.BIN / "python").touch()

    monkeypatch.setattr(setup_env, "run_uv", record)
    monkeypatch.setattr(setup_env, "prepare_uv", prepare)
    monkeypatch.setattr(setup_env, "match_dvc_to_git", lambda: None)
    return calls


def again(setup_env: ModuleType, calls: list[list[str]]) -> bool:
    """Set up once more; tell whether that called uv."""
    calls.clear()
    setup_env.set_up()
    return calls != []


def append(path: Path) -> None:
    path.write_text(path.read_text() + "# changed\n")


def test_second_set_up_installs_nothing(setup_env: ModuleType, installed: list[list[str]]) -> None:
    setup_env.set_up()
    assert [call[:2] for call in installed] == [["pip", "sync"], ["pip", "install"]]
    assert not again(setup_env, installed)


@pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml"])
def test_changed_file_is_installed_once(
    setup_env: ModuleType, installed: list[list[str]], tree: Path, changed: str
) -> None:
    setup_env.set_up()
    append(tree / changed)
    assert again(setup_env, installed)
    assert not again(setup_env, installed)


def test_other_python_is_installed_for(
    setup_env: ModuleType, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_env.set_up()
    monkeypatch.setattr(setup_env, "python_version", lambda: "3.99")
    assert again(setup_env, installed)


def test_moved_tree_is_installed_anew(
    setup_env: ModuleType, installed: list[list[str]], tree: Path
) -> None:
    setup_env.set_up()
    stamp = json.loads(setup_env.STAMP.read_text())
    assert stamp["root"] == str(tree)
    setup_env.write_stamp({**stamp, "root": "/elsewhere"})
    assert again(setup_env, installed)


def test_set_up_that_was_cut_short_is_repeated(
    setup_env: ModuleType, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = setup_env.run_uv

    def fail_at_the_end(arguments: list[str]) -> None:
        if "--editable" in arguments:
            raise setup_env.SetupError("no space left")
        record(arguments)

    monkeypatch.setenv("TORCH_BACKEND", "cpu")
    monkeypatch.setattr(setup_env, "run_uv", fail_at_the_end)
    with pytest.raises(setup_env.SetupError):
        setup_env.set_up()
    monkeypatch.delenv("TORCH_BACKEND")
    monkeypatch.setattr(setup_env, "run_uv", record)
    assert again(setup_env, installed)
    assert "cpu" in installed[0]  # the choice of torch outlives the interruption


@pytest.mark.parametrize("content", ["", "{", '{"lock": "x"}'])
def test_damaged_stamp_counts_as_none(
    setup_env: ModuleType, installed: list[list[str]], content: str
) -> None:
    setup_env.set_up()
    setup_env.STAMP.write_text(content)
    assert again(setup_env, installed)


def test_environment_whose_python_was_removed_is_made_again(
    setup_env: ModuleType, installed: list[list[str]]
) -> None:
    setup_env.set_up()
    python = setup_env.BIN / "python"
    python.unlink()
    python.symlink_to("/removed/python3.11")
    assert again(setup_env, installed)


@pytest.mark.parametrize("content", [None, "# This file was autogenerated\n"])
def test_unusable_lock_is_named_in_one_line(tree: Path, content: str | None) -> None:
    (tree / "requirements.lock").unlink()
    if content is not None:
        (tree / "requirements.lock").write_text(content)
    done = run(sys.executable, "scripts/setup_env.py", cwd=tree)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tree / "requirements.lock") in line


def test_broken_environments_do_not_pass_for_working_ones(
    setup_env: ModuleType, tree: Path
) -> None:
    assert not setup_env.venv_works()
    setup_env.BIN.mkdir(parents=True)
    pip = setup_env.BIN / "pip"
    version = setup_env.python_version()
    here = f"{tree}/.venv/lib/python{version}/site-packages/pip"
    outputs = {
        f"pip 26.3 from {here} (python {version})": True,
        f"pip 26.3 from {here} (python 3.99)": False,
        f"pip 26.3 from /elsewhere/.venv/lib/pip (python {version})": False,
        "ModuleNotFoundError: No module named 'pip'": False,
    }
    for output, works in outputs.items():
        pip.write_text(f'#!/bin/sh\necho "{output}"\n')
        pip.chmod(0o755)
        assert setup_env.venv_works() is works, output


# --- builds of torch ----------------------------------------------------------------------------


def test_locked_torch_comes_with_every_hash(
    setup_env: ModuleType, installed: list[list[str]]
) -> None:
    setup_env.set_up()
    sync = installed[0]
    assert "--require-hashes" in sync
    assert "--compile-bytecode" in sync
    assert [line for line in sync[-1].splitlines() if line] == [
        line for line in LOCK.splitlines() if not line.startswith("#")
    ]
    assert not [word for call in installed for word in call if word.startswith("--reinstall")]


def test_other_torch_is_the_locked_version_and_its_runtime_is_left_out(
    setup_env: ModuleType, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_BACKEND", "cpu")
    setup_env.set_up()
    trial, sync, install, _ = installed
    assert trial == [*install, "--dry-run"]
    assert install[install.index("--torch-backend") + 1] == "cpu"
    assert set(install[-2:]) == set(re.findall(r"^torch(?:vision)?==\S+", LOCK, re.MULTILINE))
    assert "--require-hashes" in sync
    left_out = set(re.findall(r"^(\S+)==", LOCK, re.MULTILINE)) - set(
        re.findall(r"^(\S+)==", sync[-1], re.MULTILINE)
    )
    assert {"torch", "torchvision", "triton", "nvidia-cudnn-cu13"} <= left_out
    assert all(re.match(r"torch|triton|nvidia-|cuda-", name) for name in left_out)


@pytest.mark.parametrize("backend", ["lock", "cpu"])
def test_lowest_versions_go_into_an_environment_of_their_own(
    setup_env: ModuleType,
    installed: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    monkeypatch.setenv("TORCH_BACKEND", backend)
    setup_env.set_up()
    installed.clear()
    setup_env.set_up_lowest()
    venv, requirements, editable = installed
    assert venv[-1] == str(setup_env.LOWEST_VENV)
    assert {"--all-extras", "--group", "lowest-direct"} <= set(requirements)
    assert ("--torch-backend" in requirements) is (backend == "cpu")
    python = str(setup_env.LOWEST_VENV / "bin/python")
    assert python in requirements
    assert python in editable


def test_choice_of_torch_stays_until_another_is_made(
    setup_env: ModuleType, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_BACKEND", "cpu")
    setup_env.set_up()
    monkeypatch.delenv("TORCH_BACKEND")
    assert not again(setup_env, installed)
    append(setup_env.PYPROJECT)
    assert again(setup_env, installed)
    assert "cpu" in installed[0]
    monkeypatch.setenv("TORCH_BACKEND", "lock")
    assert again(setup_env, installed)
    assert not [word for call in installed for word in call if word == "--torch-backend"]


def test_build_that_cannot_be_had_changes_nothing(
    setup_env: ModuleType, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_env.set_up()

    def refuse(arguments: list[str]) -> None:
        assert "--dry-run" in arguments
        raise setup_env.SetupError("no such build")

    monkeypatch.setenv("TORCH_BACKEND", "cu126")
    monkeypatch.setattr(setup_env, "run_uv", refuse)
    with pytest.raises(setup_env.SetupError):
        again(setup_env, installed)
    monkeypatch.delenv("TORCH_BACKEND")
    assert not again(setup_env, installed)


def test_other_build_is_replaced_by_the_locked_one(
    setup_env: ModuleType, installed: list[list[str]], tree: Path
) -> None:
    packages = tree / ".venv/lib/python3.11/site-packages"
    for package in ("torch-2.15.0+cpu", "torchvision-0.29.2+cpu", "torchmetrics-1.9.0"):
        (packages / f"{package}.dist-info").mkdir(parents=True)
    setup_env.set_up()
    renewed = {word for word in installed[0] if word.startswith("--reinstall")}
    assert renewed == {"--reinstall-package=torch", "--reinstall-package=torchvision"}


# --- what uv is told of pip's configuration -----------------------------------------------------


def test_uv_without_pip_configuration_keeps_its_defaults(setup_env: ModuleType) -> None:
    assert setup_env.uv_environment({"PATH": "/bin"}, {}) == {"PATH": "/bin"}


def test_mirror_and_certificate_reach_uv(setup_env: ModuleType) -> None:
    pip = {
        "index-url": "https://mirror/simple",
        "trusted-host": "\none\ntwo:8080",
        "cert": "/ca.pem",
        "timeout": "60",
    }
    assert setup_env.uv_environment({}, pip) == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INSECURE_HOST": "one two:8080",
        "SSL_CERT_FILE": "/ca.pem",
        "UV_HTTP_TIMEOUT": "60",
    }


def test_extra_indexes_come_after_the_main_one_and_only_with_it(setup_env: ModuleType) -> None:
    extra = {"extra-index-url": "https://b/simple\nhttps://c/simple"}
    assert setup_env.uv_environment({}, extra) == {}
    assert setup_env.uv_environment({}, {"index-url": "https://a/simple", **extra}) == {
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_DEFAULT_INDEX": "https://c/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX"])
def test_uvs_own_variables_win(setup_env: ModuleType, variable: str) -> None:
    environ = {variable: "https://chosen/simple", "SSL_CERT_FILE": "/chosen.pem"}
    pip = {"index-url": "https://mirror/simple", "cert": "/ca.pem"}
    assert setup_env.uv_environment(environ, pip) == environ


def test_uvs_torch_backend_cannot_replace_hashed_packages(setup_env: ModuleType) -> None:
    assert setup_env.uv_environment({"UV_TORCH_BACKEND": "cpu"}, {}) == {}


def test_pip_options_are_those_that_pip_install_would_take(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://global/simple\ncert = /global.pem\nproxy = http://it's\n"
        "extra_index_url =\n    https://one/simple\n    https://two/simple\n"
        "[install]\nindex-url = https://install/simple\ncert = /install.pem\n"
        "[download]\nindex-url = https://download/simple\n"
    )
    monkeypatch.setattr(setup_env, "BIN", Path(sys.executable).parent)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment/simple")
    options = setup_env.pip_options()
    assert options["index-url"] == "https://environment/simple"
    assert options["cert"] == "/install.pem"
    assert options["proxy"] == "http://it's"
    assert options["extra-index-url"].split() == ["https://one/simple", "https://two/simple"]


# --- DVC without git ----------------------------------------------------------------------------


def test_dvc_runs_outside_git_and_is_put_back_inside(
    setup_env: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "BIN", Path(sys.executable).parent)
    (tree / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", tree / ".dvc/config")
    local = tree / ".dvc/config.local"
    local.write_text("['remote \"mine\"']\n    url = https://mine\n    password = secret\n")
    (tree / "dvc.yaml").write_text(
        "stages:\n  hello:\n    cmd: echo hello > out\n    outs: [out]\n"
    )
    dvc = Path(sys.executable).parent / "dvc"
    assert run(dvc, "status", cwd=tree).returncode != 0

    setup_env.match_dvc_to_git()
    assert "no_scm = true" in local.read_text()
    repro = run(dvc, "repro", cwd=tree)
    assert repro.returncode == 0, repro.stderr
    assert (tree / "out").read_text() == "hello\n"
    assert run(dvc, "status", cwd=tree).returncode == 0

    (tree / ".git").mkdir()
    setup_env.match_dvc_to_git()
    assert "no_scm" not in local.read_text()
    assert "password = secret" in local.read_text()


@pytest.mark.parametrize("in_git", [True, False])
def test_dvc_configuration_that_fits_is_left_alone(
    setup_env: ModuleType, tree: Path, in_git: bool
) -> None:
    (tree / ".dvc").mkdir()
    if in_git:
        (tree / ".git").write_text("gitdir: a work tree's or submodule's .git is a file\n")
    else:
        (tree / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    setup_env.match_dvc_to_git()  # would raise: there is no dvc in this tree to change it with


# --- the lock -----------------------------------------------------------------------------------


def locked(environment: dict[str, str]) -> dict[str, list[str]]:
    """Return name -> versions of the entries that apply in a marker environment."""
    found: dict[str, list[str]] = {}
    for name, version, marker in re.findall(
        r"^([^\s#=]+)==(\S+)(?: ; (.*?))? \\$", LOCK, re.MULTILINE
    ):
        if not marker or Marker(marker).evaluate(environment):
            found.setdefault(name, []).append(version)
    return found


def test_every_locked_package_has_hashes_and_no_address() -> None:
    entry = (
        r"[a-z0-9][a-z0-9-]*==[\w.!+]+( ; [^\\]+)? \\\n"
        r"(    --hash=sha256:[0-9a-f]{64} \\\n)*    --hash=sha256:[0-9a-f]{64}\n"
        r"(    #   ?.*\n|    # via .*\n|    # via\n)+"
    )
    assert re.fullmatch(rf"(#.*\n)*({entry})+", LOCK)
    assert "://" not in LOCK
    assert not re.search(r"(^|[\s'\"=@])/", LOCK)
    assert "--index" not in LOCK
    assert "--find-links" not in LOCK


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_lock_satisfies_pyproject(python: str, platform: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        **PLATFORMS[platform],
    }
    versions = locked(environment)
    assert {name: found for name, found in versions.items() if len(found) != 1} == {}
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    wanted += PYPROJECT["build-system"]["requires"]  # the editable install builds without isolation
    unmet = [
        line
        for line in wanted
        if not (requirement := Requirement(line)).specifier.contains(
            versions.get(requirement.name, ["0"])[0]
        )
    ]
    assert unmet == []
    # pip sync removes what is not locked, and set-up needs these afterwards
    assert {"pip", "uv", "editables"} <= versions.keys()


# --- make ---------------------------------------------------------------------------------------


def make(tree: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run make in a copy whose set-up is skipped."""
    return run("make", *arguments, "PYTHON=true", cwd=tree, **environ)


def program(tree: Path, name: str, script: str) -> None:
    path = tree / ".venv/bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_make_alone_lists_every_goal_with_its_purpose(tree: Path) -> None:
    goals = re.search(r"^\.PHONY: (.+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert goals is not None
    listed = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", make(tree).stdout, re.MULTILINE))
    assert listed.keys() == set(goals[1].split())
    assert {"repro", "test", "setup", "ui", "lock", "clean", "help"} <= listed.keys()


def test_repro_finds_the_environments_programs_and_says_where_to_look(tree: Path) -> None:
    program(tree, "dvc", 'mnist-bn "$@"')
    program(tree, "mnist-bn", 'echo "ran $@"')
    done = make(tree, "repro")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran repro\n")
    for place in ("reports/index.html", "models/bn.onnx", "make ui"):
        assert place in done.stdout


def test_repro_that_fails_is_not_followed_by_a_happy_end(tree: Path) -> None:
    program(tree, "dvc", "exit 255")
    done = make(tree, "repro")
    assert done.returncode == 2
    assert "reports/index.html" not in done.stdout


def test_ui_stays_on_this_machine_and_reads_the_runs_that_were_tracked(tree: Path) -> None:
    program(tree, "mlflow", 'echo "$@"')
    done = make(tree, "ui", "PORT=5123", MLFLOW_TRACKING_URI="")
    assert "http://127.0.0.1:5123" in done.stdout
    assert "--host 127.0.0.1 --port 5123 --backend-store-uri sqlite:///mlflow.db" in done.stdout
    done = make(tree, "ui", MLFLOW_TRACKING_URI="sqlite:///elsewhere.db")
    assert "--backend-store-uri sqlite:///elsewhere.db" in done.stdout


def test_ui_of_a_server_is_the_servers_own(tree: Path) -> None:
    done = make(tree, "ui", MLFLOW_TRACKING_URI="https://tracking.example")
    assert done.returncode == 0
    assert "https://tracking.example" in done.stdout


def outputs(cached: bool) -> Iterator[str]:
    """Yield the outputs in dvc.yaml that DVC keeps, or those that git does."""
    stages: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    for stage in stages.values():
        for item in [*stage.get("outs", ()), *stage.get("metrics", ())]:
            path, options = next(iter(item.items())) if isinstance(item, dict) else (item, {})
            if options.get("cache", True) is cached:
                yield path.replace("${item.variant}", "bn")


def test_clean_removes_what_can_be_made_again_and_nothing_else(tree: Path) -> None:
    removed = [*outputs(cached=True), ".venv/bin/python", ".venv-lowest/x", ".mypy_cache/x"]
    kept = [
        *outputs(cached=False),
        "mlflow.db",
        "mlartifacts/x",
        ".dvc/cache/x",
        "models/README.md",
    ]
    assert len(removed) > 8
    for path in (*removed, *kept):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("x")
    assert make(tree, "clean").returncode == 0
    assert [path for path in removed if (tree / path).exists()] == []
    assert [path for path in kept if not (tree / path).exists()] == []


def test_ci_ends_as_make_test_does(tree: Path) -> None:
    (tree / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tree / ".ci/run")
    (tree / "Makefile").write_text("test:\n\techo checked\n")
    done = run("bash", ".ci/run", cwd=tree)
    assert (done.returncode, "checked\n" in done.stdout) == (0, True)
    (tree / "Makefile").write_text("test:\n\tfalse\n")
    assert run("bash", tree / ".ci/run", cwd=tree.parent).returncode == 2


# --- CI and pre-commit --------------------------------------------------------------------------


def test_ci_runs_the_pythons_that_pyproject_promises() -> None:
    workflow = YAML(typ="safe").load(ROOT / ".github/workflows/ci.yml")
    promised = re.findall(r"Python :: (\d\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == promised == [*PYTHONS]


def test_ci_tests_the_lowest_versions_on_the_lowest_python() -> None:
    steps = YAML(typ="safe").load(ROOT / ".github/workflows/ci.yml")["jobs"]["lowest"]["steps"]
    versions = [step.get("with", {}).get("python-version") for step in steps]
    assert PYTHONS[0] in versions
    assert steps[-1] == {"run": "make test-lowest"}


def test_pre_commit_runs_what_the_lock_provides() -> None:
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    done = run(sys.executable, "-m", "pre_commit", "validate-config", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    programs = {hook["entry"].split()[0] for repo in config["repos"] for hook in repo["hooks"]}
    assert {program.rpartition("/")[0] for program in programs} == {".venv/bin"}
    here = Path(sys.executable).parent
    assert [name for name in programs if not (here / Path(name).name).exists()] == []
