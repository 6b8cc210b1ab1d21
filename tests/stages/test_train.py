"""The stage as users run it: whatever happens, it ends with the bytes of an undisturbed run."""

import json
import os
import pty
import random
import re
import shutil
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import pytest

from mnist_batchnorm.core.paths import VARIANTS
from tests.support import store
from tests.support.commands import Command, environment, kill, run, running
from tests.support.pipeline import Project, make_project
from tests.support.training import (
    EPOCHS,
    OUTPUTS,
    STEPS,
    TRAIN,
    Files,
    files,
    kept,
    make_workspace,
    of,
    set_params,
)

PRINT_IMPORTS = (
    "import atexit, sys; from mnist_batchnorm.cli import main; "
    "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
)


@pytest.fixture
def workspace(tmp_path: Path, prepared: Path) -> Path:
    return make_workspace(tmp_path / "workspace", prepared)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path
) -> tuple[Files, Path, str]:
    """A run to its end: its files, its folder and what it wrote to standard error."""
    folder = make_workspace(tmp_path_factory.mktemp("undisturbed") / "workspace", prepared)
    status, err = run(folder, sys.executable, "-c", PRINT_IMPORTS, "train")
    assert status == 0, err
    return files(folder), folder, err


@pytest.fixture
def expected(undisturbed: tuple[Files, Path, str]) -> Files:
    return undisturbed[0]


def test_command_writes_the_six_files_and_leaves_nothing_else(
    undisturbed: tuple[Files, Path, str],
) -> None:
    written, folder, err = undisturbed
    assert written.keys() == OUTPUTS["bn"] | OUTPUTS["plain"]
    assert kept(folder) == []
    for variant in VARIANTS:
        assert f"training {variant} on cpu\n" in err
        rows = re.findall(rf"^{variant:5}  epoch (..)/{EPOCHS}  train loss \d", err, re.MULTILINE)
        assert [int(row) for row in rows] == list(range(1, EPOCHS + 1))
    assert "step" not in err  # no bar where nobody looks
    metrics = json.loads(written["reports/metrics/train-bn.json"])
    assert metrics["epoch"] == EPOCHS
    assert metrics["valid_accuracy"] > 0.85


def test_process_that_shows_imports_nothing_heavy(undisturbed: tuple[Files, Path, str]) -> None:
    modules = set(undisturbed[2].splitlines()[-1].split())
    assert "mnist_batchnorm.stages.train" in modules
    assert not modules & {"torch", "mlflow", "numpy", "safetensors", "dvc", "pandas"}


def at_epoch(number: int, variant: str = "bn") -> Callable[[Command], bool]:
    line = re.compile(rf"^{variant:5}  epoch +{number}/", re.MULTILINE)
    return lambda command: bool(line.search(command.err))


def goes_on_to(expected: Files, folder: Path, *words: str) -> str:
    """Run the command again and check that nothing shows that it had been disturbed."""
    status, err = run(folder, *(words or TRAIN))
    assert status == 0, err
    assert files(folder) == expected
    assert kept(folder) == []
    return err


def check_interrupted(command: Command, folder: Path, epoch: int) -> None:
    assert command.wait() == 130
    said = re.search(r"^bn goes on after epoch (\d+), from (.*)$", command.err, re.MULTILINE)
    assert said, command.err
    assert int(said[1]) >= epoch
    assert Path(said[2]).parent == folder / ".checkpoints"
    assert Path(said[2]).exists()
    assert re.search(r"^plain (goes on after|has no whole|had not)", command.err, re.MULTILINE)
    assert command.err.endswith("interrupted\n")
    assert "Traceback" not in command.err
    assert command.processes() == []


def check_lost(command: Command, folder: Path, variant: str, epoch: int) -> None:
    assert command.wait() == 1
    said = re.search(
        rf"^FAILED: {variant}: its process was ended by SIGKILL, as the system does when memory "
        rf"runs out; {variant} goes on after epoch (\d+), from (.*)$",
        command.err,
        re.MULTILINE,
    )
    assert said, command.err
    assert int(said[1]) >= epoch
    assert Path(said[2]).parent == folder / ".checkpoints"
    assert Path(said[2]).exists()
    assert command.processes() == []


def on_a_terminal(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Run a command as `run` does, on a terminal: return what that shows."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with running(folder, *words, env=environment(**variables), terminal=terminal) as command:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # Linux's end of file, when nobody has it open any more
                break
            if not chunk:
                break
            shown += chunk
        os.close(master)
        return command.wait(), shown.decode()


def test_command_that_is_interrupted_and_then_loses_a_process_ends_with_the_same_bytes_and_a_bar(
    workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(3))
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        check_interrupted(command, workspace, 3)
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(5))
        assert re.search(r"going on after epoch \d+, from .*/\.checkpoints/bn-", command.err)
        kill(*command.processes("bn"))
        check_lost(command, workspace, "bn", 5)
    written = files(workspace)
    assert written.keys() >= OUTPUTS["plain"]
    assert written.items() <= expected.items()  # the other may have been about to end
    status, shown = on_a_terminal(workspace, *TRAIN)
    assert status == 0, shown
    assert f"{2 * EPOCHS * STEPS}/{2 * EPOCHS * STEPS} [" in shown  # the bar, at its end
    assert "step/s]" in shown
    assert files(workspace) == expected
    assert kept(workspace) == []


@pytest.fixture
def tracked(workspace: Path) -> Path:
    """A workspace whose runs an MLflow store takes."""
    (workspace / "dvc.yaml").write_text(store.DVC_YAML)
    (workspace / "train.py").write_text("print('train')\n")
    (workspace / "mlflow.db").write_bytes(store.empty_database())
    return workspace


@pytest.mark.slow
def test_tracked_command_on_a_terminal_has_the_same_bytes(tracked: Path, expected: Files) -> None:
    status, shown = on_a_terminal(tracked, *TRAIN)
    assert status == 0, shown
    assert f"{2 * EPOCHS * STEPS}/{2 * EPOCHS * STEPS} [" in shown
    assert files(tracked) == expected
    assert kept(tracked) == []
    if "MLflow does not have all of this yet" not in shown:  # on a machine that is not too busy
        recorded = {run.data.params["variant"]: run for run in store.all_runs(tracked)}
        assert recorded.keys() == {*VARIANTS}
        for one in recorded.values():
            assert one.info.status == "FINISHED"
            steps = [step for step, _ in store.history(tracked, one, "curves/train_loss")]
            assert steps == list(range(1, EPOCHS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_network_alone_has_the_bytes_of_both(
    variant: str, workspace: Path, expected: Files
) -> None:
    status, err = run(workspace, *TRAIN, variant)
    assert status == 0, err
    assert files(workspace) == of(variant, expected)


@pytest.mark.slow
@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_server_and_bar_change_no_byte(
    server: Callable[[], AbstractContextManager[str]], tracked: Path, expected: Files
) -> None:
    with server() as uri:
        start = time.monotonic()
        status, shown = on_a_terminal(tracked, *TRAIN, MLFLOW_TRACKING_URI=uri)
    assert status == 0, shown
    assert "MLflow does not have all of this yet" in shown
    assert files(tracked) == expected
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_ctrl_c_of_the_command_alone_ends_all_too(workspace: Path, expected: Files) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(5))
        command.process.send_signal(signal.SIGINT)
        check_interrupted(command, workspace, 5)
    goes_on_to(expected, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.7, 1.0, 1.5, 2.0, 2.5])
def test_ctrl_c_while_it_starts_shows_no_traceback(
    seconds: float, workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(lambda command: bool(command.processes("bn")))
        time.sleep(seconds)
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.wait() == 130
        assert "Traceback" not in command.err
        assert command.processes() == []
    goes_on_to(expected, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_networks_whose_command_is_killed_end_by_themselves(
    at_once: bool, workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(4))
        kill(command.process.pid)
        assert command.wait() == -signal.SIGKILL
        assert at_once or command.gone()
        goes_on_to(expected, workspace)
        assert command.gone()
    assert "Traceback" not in command.err
    assert kept(workspace) == []


@pytest.mark.slow
def test_loss_that_is_no_number_fails_the_command(workspace: Path) -> None:
    set_params(workspace, lr=1e38)
    status, err = run(workspace, *TRAIN)
    assert status == 1
    why = (
        "the loss is no longer finite in epoch 1, step 2 of 56 (lr 1e+38): "
        "lower train.lr in params.yaml"
    )
    assert f"FAILED: bn: {why}\nplain: {why}\n" in err
    assert files(workspace) == {}
    assert kept(workspace) == []


@pytest.mark.slow
def test_disk_without_room_for_the_weights_is_the_users_mistake(
    workspace: Path, expected: Files, mount: Callable[[Path, str], None]
) -> None:
    mount(workspace / "models", "128k")  # for one of the two
    status, err = run(workspace, *TRAIN)
    assert status == 2, err
    said = re.search(
        r"^error: (bn|plain): \[Errno 28\] No space left on device; \1 goes on after epoch 60, ",
        err,
        re.MULTILINE,
    )
    assert said, err
    (other,) = {*VARIANTS} - {said[1]}
    assert files(workspace) == of(other, expected)
    os.system(f"mount -o remount,size=1m {workspace / 'models'}")
    goes_on_to(expected, workspace)


@pytest.mark.slow
def test_two_commands_at_once_write_the_same_bytes(workspace: Path, expected: Files) -> None:
    with running(workspace, *TRAIN) as one, running(workspace, *TRAIN) as other:
        assert (one.wait(), other.wait()) == (0, 0), one.err + other.err
    assert files(workspace) == expected
    assert kept(workspace) == []


# --- real kills, at any moment --------------------------------------------------------------------


KILLS = 4  # in each of the tests below, before the run that is let be


def temporary(folder: Path) -> set[str]:
    """Files that are being written at this moment."""
    return {path.name for path in folder.glob(".*.tmp")}


def checkpoint_being_written(folder: Path, number: int) -> Callable[[Command], bool]:
    """The number-th time that one is seen."""
    seen: set[str] = temporary(folder / ".checkpoints")
    before = len(seen)

    def written(_: Command) -> bool:
        seen.update(temporary(folder / ".checkpoints"))
        return len(seen) >= before + number

    return written


def checkpoint_written(folder: Path, number: int) -> Callable[[Command], bool]:
    """The number-th time that one has taken the place of the one before."""
    seen: set[tuple[str, int]] = set()

    def written(_: Command) -> bool:
        for path in (folder / ".checkpoints").glob("*.safetensors"):
            with suppress(FileNotFoundError):  # removed: the run has ended
                seen.add((path.name, path.stat().st_ino))
        return len(seen) >= number

    return written


def outputs_being_written(folder: Path, _: int) -> Callable[[Command], bool]:
    places = ("models", "reports/curves", "reports/metrics")
    before = {place: temporary(folder / place) for place in places}
    return lambda _: any(temporary(folder / place) - before[place] for place in places)


def after(seconds: float) -> Callable[[Command], bool]:
    deadline = time.monotonic() + seconds
    return lambda _: time.monotonic() >= deadline


WATCHED = [checkpoint_being_written, checkpoint_written, outputs_being_written]


def strike(
    command: Command, moment: Callable[[Command], bool], victims: str, generator: random.Random
) -> bool:
    """Kill at a moment; return whether there was anything left to kill."""
    known, refreshed = [command.process.pid], 0.0
    while not moment(command):
        if command.process.poll() is not None:
            return False
        if time.monotonic() - refreshed > 0.05:  # so that the kill itself comes at once
            known, refreshed = command.processes(), time.monotonic()
    if command.process.poll() is not None:
        return False
    generator.shuffle(known)
    if victims == "all":
        # the command first, lest it see the others end: DVC would then rewrite its lock file in
        # place, and a kill on the way leaves it one that it cannot read
        kill(command.process.pid, *known)
        command.kill()
    elif victims == "command":
        kill(command.process.pid)
        command.process.wait()
    else:
        workers = command.processes("mnist_batchnorm.training.worker")
        kill(*generator.sample(workers, min(1, len(workers))))
        command.wait()
    return True


@pytest.fixture(scope="module")
def duration(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> float:
    """Seconds of an undisturbed run, on this machine, as busy as it is."""
    folder = make_workspace(tmp_path_factory.mktemp("duration") / "workspace", prepared)
    start = time.monotonic()
    assert run(folder, *TRAIN)[0] == 0
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_any_moment_change_no_byte(
    seed: int, workspace: Path, expected: Files, duration: float
) -> None:
    generator = random.Random(seed)
    kills = 0
    with ExitStack() as started:
        while kills < KILLS:
            if generator.random() < 0.5:
                moment = after(generator.uniform(0.0, duration))
            else:
                moment = generator.choice(WATCHED)(workspace, generator.randint(1, 8))
            victims = generator.choice(["all", "all", "all", "command", "worker"])
            command = started.enter_context(running(workspace, *TRAIN))
            kills += strike(command, moment, victims, generator)  # it may have ended before
            for name, content in files(workspace).items():
                assert name.endswith(".tmp") or content == expected[name], name
        status, err = run(workspace, *TRAIN)
    assert status == 0, err
    written = files(workspace)
    half = {name for name in written if name.endswith(".tmp")}  # no run takes them for a file
    assert {name: written[name] for name in written.keys() - half} == expected
    assert kept(workspace) == []


@pytest.mark.slow
def test_kills_of_dvc_change_no_byte(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    project = make_project(tmp_path / "undisturbed/project")
    set_params(project.folder, epochs=EPOCHS)
    project.check("dvc", "repro", "prepare")
    disturbed = Project(tmp_path / "disturbed/project")
    shutil.copytree(project.folder.parent, disturbed.folder.parent, symlinks=True)
    project.check("dvc", "repro", "train")
    # not what a killed writer leaves: .bn.csv.0123456789abcdef.tmp
    patterns = ("dvc.lock", "models/[!.]*", "reports/metrics/train-*", "reports/curves/[!.]*")
    expected = project.hashes(*patterns)
    assert len(expected) == 7

    generator = random.Random(0)
    moments = [
        at_epoch(3),
        checkpoint_being_written(disturbed.folder, 5),
        at_epoch(12, "plain"),
        outputs_being_written(disturbed.folder, 1),
    ]
    for moment in moments:
        words = ("dvc", "repro", "train")
        with running(disturbed.folder, *words, env=disturbed.environment) as command:
            assert strike(command, moment, "all", generator), command.err
    output = disturbed.check("dvc", "repro", "train")
    assert "going on after epoch" in output
    assert disturbed.hashes(*patterns) == expected
    assert kept(disturbed.folder) == []

    disturbed.check("dvc", "repro", "train")  # has nothing to do
    client = MlflowClient(f"sqlite:///{disturbed.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist-batchnorm'")
    recorded = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["variant"] for run in recorded) == ["bn", "plain"]
    for one in recorded:
        points = client.get_metric_history(one.info.run_id, "curves/train_loss")
        steps = sorted(point.step for point in points)
        assert len(steps) == len(set(steps))
