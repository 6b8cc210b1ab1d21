import gc
import hashlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from mnist_batchnorm.cli import COMMANDS
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.data.download import FILES
from tests.conftest import MnistBn
from tests.support.finished import finish, write_pages
from tests.support.store import make_trainable, use_settings

HEAVY = {"torch", "mlflow", "onnx", "onnxruntime", "matplotlib", "dvc", "pandas"}
PRINT_IMPORTS = """
import sys
from mnist_batchnorm.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """Run the command line in a new process, which must succeed; return the imported modules."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_IMPORTS, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stderr.splitlines()[-1].split())


# --- what is imported ---------------------------------------------------------------------------


def test_help_imports_no_stage() -> None:
    modules = imported("--help")
    ours = {name for name in modules if name.startswith("mnist_batchnorm")}
    packages = {name.rpartition(".")[0] for name in ours}
    assert packages == {"", "mnist_batchnorm", "mnist_batchnorm.core"}
    assert not modules & (HEAVY | {"numpy"})


def test_download_and_prepare_import_no_heavy_package(
    project: Path, raw: Path, params: Params
) -> None:
    text = (project / "params.yaml").read_text().replace("valid_size: 5000", "valid_size: 200")
    (project / "data/raw").mkdir(parents=True)
    for stem, sha256 in params.download.sha256.by_file().items():
        content = (raw / FILES[stem]).read_bytes()
        (project / "data/raw" / FILES[stem]).write_bytes(content)
        text = text.replace(sha256, hashlib.sha256(content).hexdigest())
    (project / "params.yaml").write_text(text)
    for command in ("download", "prepare"):
        modules = imported(command)
        assert f"mnist_batchnorm.stages.{command}" in modules
        assert not modules & HEAVY
    assert (project / "data/prepared/train.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "needed"),
    [("report", {"matplotlib"}), ("sync", {"mlflow", "onnx"})],
)
def test_report_and_sync_run_without_torch(
    project: Path,
    prepared: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    needed: set[str],
) -> None:
    use_settings(monkeypatch)
    finish(project, prepared, params)
    make_trainable(project)
    write_pages(project)
    modules = imported(command)
    assert needed <= modules
    assert not modules & {"torch", "onnxscript", "torchvision"}


def test_short_commands_run_without_garbage_collection(
    monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn
) -> None:
    @click.command()
    def command() -> None:
        click.echo(gc.isenabled())

    for name in ("prepare", "train"):
        monkeypatch.setattr(f"mnist_batchnorm.stages.{name}.command", command)
    assert mnist_bn("prepare").out == "False\n"
    assert gc.isenabled()
    assert mnist_bn("train").out == "True\n"


# --- help ---------------------------------------------------------------------------------------


def test_help_lists_the_commands_in_order(mnist_bn: MnistBn) -> None:
    done = mnist_bn("--help")
    assert done.status == 0
    section = done.out.partition("Commands:\n")[2]
    names = [line.split()[0] for line in section.splitlines() if line[2:3].strip()]
    assert names == list(COMMANDS)
    for summary in COMMANDS.values():
        assert " ".join(summary.split()) in " ".join(done.out.split())
    assert mnist_bn("-h") == done


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, mnist_bn: MnistBn) -> None:
    done = mnist_bn(command, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: mnist-bn {command} ")
    assert done.err == ""


def test_train_accepts_either_network_or_both(mnist_bn: MnistBn) -> None:
    assert mnist_bn("train", "--help").out.startswith(
        "Usage: mnist-bn train [OPTIONS] [bn] [plain]\n"
    )


def test_version(mnist_bn: MnistBn) -> None:
    done = mnist_bn("--version")
    assert done.status == 0
    assert done.out == f"mnist-bn, version {version('mnist-batchnorm')}\n"


# --- exit statuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (CheckFailedError("3 of 10,000 differ"), 1, "FAILED: 3 of 10,000 differ\n"),
        (UserError("no such file"), 2, "error: no such file\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_exit_status_and_message_of_each_error(
    error: BaseException | None,
    status: int,
    message: str,
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @click.command()
    def command() -> None:
        click.echo("result")
        if error:
            raise error

    monkeypatch.setattr("mnist_batchnorm.stages.prepare.command", command)
    done = mnist_bn("prepare")
    assert (done.status, done.out, done.err) == (status, "result\n", message)


def test_an_unexpected_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn
) -> None:
    @click.command()
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mnist_batchnorm.stages.prepare.command", command)
    with pytest.raises(ZeroDivisionError):
        mnist_bn("prepare")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["trian", "bn"], "No such command 'trian'"),
        (["--fast"], "No such option"),
        (["train", "resnet"], "'resnet' is not one of 'bn', 'plain'"),
        (["train", "bn", "resnet"], "'resnet' is not one of 'bn', 'plain'"),
        (["evaluate", "bn", "resnet"], "'resnet' is not one of 'bn', 'plain'"),
        (["prepare", "now"], "unexpected extra argument"),
        (["prepare", "--seed", "1"], "No such option"),
    ],
)
def test_wrong_usage_exits_2(line: list[str], message: str, mnist_bn: MnistBn) -> None:
    done = mnist_bn(*line)
    assert done.status == 2
    assert message in done.err
    assert done.out == ""


ARGUMENTS = {  # of the commands that require some
    "package": ["package", "triton", "out"],
    "predict": ["predict", "any.png"],
    "promote": ["promote", "1"],
    "serve": ["serve", "--port", "0"],
    "which": ["which", "any.onnx"],
}
REMEDY = re.compile(r"run (this in the folder that holds dvc\.yaml|`dvc repro \w+` first)\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_outside_the_project_each_command_exits_2_with_a_remedy(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mnist_bn(*ARGUMENTS.get(command, [command]))
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert REMEDY.search(done.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [n for n in COMMANDS if n not in ("download", "which")])
def test_before_the_stages_it_needs_each_command_exits_2_with_a_remedy(
    command: str, project: Path, mnist_bn: MnistBn
) -> None:
    done = mnist_bn(*ARGUMENTS.get(command, [command]))
    assert done.status == 2
    assert done.out == ""
    assert re.search(r"^error: ", done.err, re.MULTILINE)
    assert "Traceback" not in done.err
    assert REMEDY.search(done.err)
    assert [path.name for path in project.iterdir()] == ["params.yaml"]
