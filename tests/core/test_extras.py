"""What each extra of pyproject.toml suffices for, and the message where one is missing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from mnist_batchnorm.cli import COMMANDS, EXTRA
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.extras import EXTRAS, missing_extra, require_extra
from tests.support.blocked_imports import ROOT, declared, owners, run_with_extras

SOURCE = ROOT / "src/mnist_batchnorm"
INDIRECT = {"cryptography", "google", "grpc"}  # parts of pyopenssl's, onnx's and tritonclient's API


# --- the table and pyproject.toml ---------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_lists_the_modules_of_the_extra(extra: str) -> None:
    requirements = {
        canonicalize_name(item.name)
        for item in declared(extra)
        if item.marker is None or item.marker.evaluate()
    }
    if extra == "grpc":
        requirements -= {canonicalize_name(item.name) for item in declared("serve")}
    table = {module: owners().get(module, set()) & requirements for module in EXTRAS[extra]}
    assert [module for module, names in table.items() if not names] == []
    assert set().union(*table.values()) == requirements


def third_party_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    roots = {name.partition(".")[0] for name in names}
    return roots - sys.stdlib_module_names - {"mnist_batchnorm"}


def test_every_import_is_declared() -> None:
    modules = {name for path in SOURCE.rglob("*.py") for name in third_party_imports(path)}
    core = {item.name for item in declared(None)}
    assert modules - INDIRECT - core <= set().union(*EXTRAS.values())


# --- what an extra suffices for -----------------------------------------------------------------

IMPORT = """
import importlib, pkgutil
import mnist_batchnorm
for package in PACKAGES:
    module = importlib.import_module(f"mnist_batchnorm.{package}")
    if hasattr(module, "__path__"):
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            if not found.name.startswith(tuple(f"mnist_batchnorm.{name}" for name in BUT)):
                importlib.import_module(found.name)
"""


@pytest.mark.parametrize(
    ("extras", "packages", "but"),
    [
        ((), ("cli", "parity.report"), ()),
        (("gate",), ("parity", "network"), ()),
        (("client",), ("commands.predict", "client"), ()),
        (("client", "serve"), ("commands.predict", "client", "serve.core"), ()),
        (("serve",), ("commands.serve", "serve"), ("serve.grpc",)),
        (("grpc",), ("commands.serve", "serve"), ()),
        pytest.param(("pipeline",), ("stages", "commands"), (), marks=pytest.mark.slow),
        (("signing",), ("signing.signer", "commands.sign", "commands.verify_signature"), ()),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_an_extra_suffices_for_its_packages(
    extras: tuple[str, ...], packages: tuple[str, ...], but: tuple[str, ...]
) -> None:
    done = run_with_extras(extras, f"PACKAGES, BUT = {packages}, {but}\n{IMPORT}")
    assert done.returncode == 0, done.stderr


def test_the_parity_library_imports_lazily() -> None:
    done = run_with_extras((), "import mnist_batchnorm.parity as p, sys; p.Check\n")
    assert done.returncode == 0, done.stderr


# --- the message --------------------------------------------------------------------------------

RUN_COMMANDS = """
from mnist_batchnorm.cli import main
for command, *arguments in COMMANDS:
    sys.argv = ["mnist-bn", command, *arguments]
    try:
        main()
    except SystemExit as end:
        print(command, end.code)
"""
ARGUMENTS = {
    "package": ["triton", "out"],
    "predict": ["any.png"],
    "promote": ["1"],
}


def run_commands(
    extras: tuple[str, ...], names: list[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    lines = [(name, *ARGUMENTS.get(name, [])) for name in names]
    change = f"import os; os.chdir({str(folder)!r})"
    return run_with_extras(extras, f"{change}\nCOMMANDS = {lines}{RUN_COMMANDS}")


def test_each_command_names_the_extra_that_it_lacks(tmp_path: Path) -> None:
    # tests/signing has the message of sign and verify-signature; which first looks for dvc.yaml
    names = [name for name in COMMANDS if EXTRA.get(name) != "signing" and name != "which"]
    done = run_commands((), names, tmp_path)
    assert done.stdout.splitlines() == [f"{name} 2" for name in names], done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert line.startswith("error: ")
        assert line.endswith(f"pip install 'mnist-batchnorm[{EXTRA.get(name, 'pipeline')}]'")


def test_predict_without_a_server_needs_serve(tmp_path: Path) -> None:
    done = run_commands(("client",), ["predict"], tmp_path)
    assert done.stderr.endswith("is not installed: pip install 'mnist-batchnorm[serve]'\n")


def test_a_module_of_no_extra_is_a_defect() -> None:
    assert missing_extra(ModuleNotFoundError(name="mnist_batchnorm.typo"), "pipeline") is None


def test_a_required_extra_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("pipeline")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"^torch is not installed: pip install .*\[pipeline\]'$"):
        require_extra("pipeline")


# --- the built wheel ----------------------------------------------------------------------------

JUDGE = """
import importlib.util
import torch
from mnist_batchnorm.network.model import Architecture, Checkpoint, save_checkpoint
from mnist_batchnorm.network.onnx import trace
from mnist_batchnorm.parity import check

absent = ("dvc", "mlflow", "matplotlib", "pydantic", "ruamel", "starlette")
assert not [name for name in absent if importlib.util.find_spec(name)]
architecture = Architecture((4, 3, 2), batch_norm=True)
model = architecture.build()
for batch in torch.randn(20, 16, 4):
    model(batch)
save_checkpoint(Path("bn.safetensors"), Checkpoint(architecture, model.state_dict(), {}))
Path("bn.onnx").write_bytes(trace(model.eval(), (4,))[False].SerializeToString())
assert check("bn.onnx", "bn.safetensors", model=model).parity
"""


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_the_wheel_with_gate_alone_judges_a_file(tmp_path: Path) -> None:
    """Two minutes with the locked build of PyTorch in uv's cache; TORCH_BACKEND=cpu needs less."""
    uv = [sys.executable, "-m", "uv"]
    backend = os.environ.get("TORCH_BACKEND", "")
    torch = ["--torch-backend", backend] if backend not in {"", "lock"} else []
    build = [*uv, "build", "--wheel", "--no-build-isolation", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([*uv, "venv", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    install = [*uv, "pip", "install", "--python", python, *torch, f"{wheel}[gate]"]
    subprocess.run(install, check=True)
    without_source = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    judge = [python, "-c", f"from pathlib import Path\n{JUDGE}"]
    done = subprocess.run(
        judge, cwd=tmp_path, env=without_source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
