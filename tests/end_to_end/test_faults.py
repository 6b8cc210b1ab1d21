"""Whatever befalls the tracker while a command trains: the same bytes, and nothing lost for good.

The real command, both networks, against a real server that is killed, paused, or made to fail.
"""

import csv
import functools
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.mlflow_sync.points import CURVE
from tests.conftest import fill
from tests.support import commands, services, store
from tests.support.commands import Command, environment, run, running
from tests.support.services import Faulty, Mode, Server
from tests.support.training import OUTPUTS, TRAIN, Files, files, make_workspace
from tests.training.test_live import INCOMPLETE

if TYPE_CHECKING:
    from mlflow.entities import Run

Expected = Callable[..., list[Files]]

TRAININGS = 20
EPOCHS = 8
SYNC = ("mnist-bn", "sync")
ALONE = "the trainings alone: "  # what sync says where no later stage has run
DEADLINE = 600.0  # seconds for all trainings without a tracker; the machine may be busy

# Trains one network in several folders: PyTorch starts once for all.
UNTRACKED = """
import os, sys
from mnist_batchnorm.training.worker import train_network
variant, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    train_network(variant, lambda event: None)
"""

# The command, with all the time that the process beside it asks for: what that says of its store
# does not depend on how busy the machine is.
PATIENT = """
from mnist_batchnorm import cli
from mnist_batchnorm.training import live
live.DELIVERY_GRACE_S = 60.0
cli.main()
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    store.use_settings(monkeypatch)


def make_trainable(folder: Path, prepared: Path, seed: int, epochs: int = EPOCHS) -> Path:
    """A folder whose trainings last for seconds, long enough for a server to come and go."""
    make_workspace(folder, prepared, seed=seed, epochs=epochs, batch_size=2, hidden=[256, 256])
    store.make_trainable(folder)
    return folder


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What so many trainings write, from seeds 0, 1, ..., that nobody follows."""

    @functools.cache
    def train(count: int, epochs: int = EPOCHS) -> list[Files]:
        top = tmp_path_factory.mktemp("untracked")
        folders = [make_trainable(top / str(s), prepared, s, epochs) for s in range(count)]
        words = [sys.executable, "-P", "-c", UNTRACKED]
        with ExitStack() as stack:
            processes = [
                stack.enter_context(running(top, *words, variant, *map(str, folders)))
                for variant in VARIANTS
            ]
            for process in processes:
                assert process.process.wait(DEADLINE) == 0, process.err
        return [files(folder) for folder in folders]

    return train


def assert_same(folder: Path, wanted: Files) -> None:
    """Weights, curves and metrics are those, byte for byte."""
    assert wanted.keys() == set().union(*OUTPUTS.values())
    written = files(folder)
    assert {name: written.get(name) for name in wanted} == wanted


def said(command_err: str) -> list[str]:
    """What a training wrote to standard error beside its progress."""
    progress = tuple(f"{start}{variant}" for variant in VARIANTS for start in ("", "training "))
    return [line for line in command_err.splitlines() if not line.startswith(progress)]


def assert_said_once(lines: list[str]) -> bool:
    """One warning at most, then one line about the rest at most; tell whether that is there."""
    pending = lines[-1:] == [INCOMPLETE]
    warnings = lines[: len(lines) - pending]
    assert len(warnings) <= 1, lines
    assert all(line.startswith("warning: MLflow at ") for line in warnings), lines
    return pending


def curve(folder: Path, variant: str) -> list[dict[str, float]]:
    """The learning curve that a training wrote."""
    with (folder / f"reports/curves/{variant}.csv").open() as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def assert_complete(folder: Path, runs: "list[Run]") -> None:
    """There is one run of each network, finished, that holds all that is in the files, once."""
    found = {run.data.params.get("variant"): run for run in runs}
    states = [(run.data.params.get("variant"), run.info.status) for run in runs]
    assert sorted(states) == [(variant, "FINISHED") for variant in VARIANTS]
    params = load_params(folder / "params.yaml")
    sections = {"prepare": params.prepare, "train": params.train}
    flat = {
        f"{section}.{name}": str(value)
        for section, of in sections.items()
        for name, value in of.model_dump(mode="json").items()
    }
    for variant, one in found.items():
        own = {"variant": variant, "batch_norm": str(variant == "bn").lower()}
        assert one.data.params == {**flat, **own}
        assert one.data.metrics.keys() == {*CURVE.values()}
        rows = curve(folder, variant)
        assert [row["epoch"] for row in rows] == list(range(1, params.train.epochs + 1))
        for column, metric in CURVE.items():
            points = [(row["epoch"], row[column]) for row in rows]
            assert store.history(folder, one, metric) == points, metric
        splits = [given.dataset.name for given in one.inputs.dataset_inputs]
        assert sorted(splits) == ["train", "valid"]


# --- a server that anything may befall ------------------------------------------------------------

FAULTS: tuple[Mode | str, ...] = ("kill", "pause", "500", "hang", "drop", "full", "refuse")


class Site:
    """A server and the way to it, which fail as they are told to."""

    def __init__(self, server: Server, proxy: Faulty) -> None:
        self.server = server
        self.proxy = proxy
        self._fault = ""

    def fail(self, fault: str) -> None:
        self._fault = fault
        match fault:
            case "kill":
                self.server.kill()
            case "pause":
                self.server.pause()
            case "500" | "hang" | "drop" | "full" | "refuse":
                self.proxy.switch(fault)

    def heal(self) -> None:
        """Be well again, and wait until that is so."""
        fault, self._fault = self._fault, ""
        self.proxy.switch("pass")
        if fault == "kill":
            self.server.start()
        if fault == "pause":
            self.server.resume()
        deadline = time.monotonic() + services.PATIENCE
        while not self.server.healthy():
            assert time.monotonic() < deadline, self.server.log
            time.sleep(0.05)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(store.empty_database())
    with (
        services.mlflow_server(
            f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artefacts"), folder=folder
        ) as server,
        Faulty(server.uri) as proxy,
    ):
        yield Site(server, proxy)


def pause_until(command: Command, condition: Callable[[], bool]) -> None:
    """Wait for something that may not happen before the command ends."""
    deadline = time.monotonic() + commands.PATIENCE
    while command.process.poll() is None and not condition():
        assert time.monotonic() < deadline, command.err
        time.sleep(0.005)


def disturb(chance: random.Random, site: Site, command: Command, first: str) -> list[str]:
    """Have the server fail at random moments, for random times, until the training ends.

    Half of the moments are after some time, half after some requests, so that what belongs together
    is torn apart.

    Returns:
        What happened, to be told when a test fails.
    """
    story: list[str] = []
    begun = time.monotonic()
    pause_until(
        command, lambda: len(command.processes("mnist_batchnorm.training.worker")) == len(VARIANTS)
    )
    fault = first
    while command.process.poll() is None:
        moment, asked = time.monotonic() + chance.uniform(0, 4), len(site.proxy.requests)
        count = chance.randrange(1, 40)
        if chance.random() < 0.5:
            pause_until(command, lambda: time.monotonic() > moment)  # noqa: B023 - called here
        else:
            pause_until(command, lambda: len(site.proxy.requests) >= asked + count)  # noqa: B023
        end = time.monotonic() + chance.choice([0.1, 0.5, 1.5, 3, DEADLINE])
        at, asked = time.monotonic() - begun, len(site.proxy.requests) - asked
        site.fail(fault)
        pause_until(command, lambda: time.monotonic() > end)  # noqa: B023
        story.append(f"{fault} from {at:.2f} s to {time.monotonic() - begun:.2f} s, {asked=}")
        site.heal()
        fault = chance.choice(FAULTS)
    return story


@pytest.mark.slow
@pytest.mark.timeout(2 * DEADLINE)
@pytest.mark.parametrize("seed", range(TRAININGS))
def test_training_does_not_notice_and_sync_completes_it(
    seed: int,
    site: Site,
    prepared: Path,
    tmp_path: Path,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = expected(TRAININGS)[seed]
    folder = make_trainable(tmp_path / "training", prepared, seed)
    # for this process, whose questions no fault shall meet
    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    before = {run.info.run_id for run in store.all_runs(folder)}

    def new() -> "list[Run]":
        return [run for run in store.all_runs(folder) if run.info.run_id not in before]

    # soon enough to be tried again
    tracked = environment(MLFLOW_TRACKING_URI=site.proxy.uri, MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    site.proxy.requests.clear()
    with running(folder, *TRAIN, env=tracked) as command:
        try:
            story = disturb(random.Random(seed), site, command, FAULTS[seed % len(FAULTS)])
            status, left, err = command.wait(), command.processes(), command.err
        finally:
            site.heal()
    lines = said(err)
    # pytest shows it when the test fails
    print("\n".join([*story, f"{len(site.proxy.requests)} requests", *lines]))  # noqa: T201
    assert status == 0, err
    assert left == []
    assert_same(folder, wanted)
    if not assert_said_once(lines):
        assert_complete(folder, new())

    status, err = run(folder, *SYNC, env=tracked | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20"})
    assert (status, err.count("\n")) == (0, 1), err
    assert err.startswith(ALONE)
    assert_complete(folder, new())
    assert_same(folder, wanted)
    assert {run.info.status for run in store.all_runs(folder)} == {"FINISHED"}
    # one for each network and training so far, each known by its key
    keys = [run.data.tags["mnist_bn.key"] for run in store.all_runs(folder)]
    assert len(keys) == len({*keys}) == len(before) + len(VARIANTS)


# --- a disk that is full --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["database", "no database"])
def test_full_disk_under_the_database_is_the_trackers_trouble_alone(
    there: bool,
    prepared: Path,
    tmp_path: Path,
    expected: Expected,
    mount: Callable[[Path, str], None],
) -> None:
    wanted = expected(1, epochs=2)[0]
    folder, disk = make_trainable(tmp_path / "training", prepared, 0, epochs=2), tmp_path / "disk"
    mount(disk, "8m")
    uri = f"sqlite:///{disk / 'mlflow.db'}"
    if there:
        (disk / "mlflow.db").write_bytes(store.empty_database())
    fill(disk)
    tracked = environment(MLFLOW_TRACKING_URI=uri)
    with running(folder, sys.executable, "-P", "-c", PATIENT, "train", env=tracked) as command:
        status, left, lines = command.wait(), command.processes(), said(command.err)
    assert (status, left) == (0, []), command.err
    assert_same(folder, wanted)
    assert assert_said_once(lines)
    assert "disk" in lines[0] or "space" in lines[0], lines

    (disk / "filler").unlink()
    status, err = run(folder, *SYNC, env=tracked)
    assert (status, err.count("\n")) == (0, 1), err
    assert err.startswith(ALONE)
    # a copy, for this process keeps open what it looks at, and a disk in use stays mounted
    shutil.copy(disk / "mlflow.db", folder)
    assert_complete(folder, store.all_runs(folder))


# --- a server that never answers ------------------------------------------------------------------


def test_server_that_hangs_for_good_costs_no_byte_and_leaves_no_process(
    prepared: Path, tmp_path: Path, expected: Expected
) -> None:
    wanted = expected(1, epochs=2)[0]
    folder = make_trainable(tmp_path / "training", prepared, 0, epochs=2)
    with store.hanging() as uri:
        tracked = environment(MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT="600")
        with running(folder, *TRAIN, env=tracked) as command:
            status, left, lines = command.wait(), command.processes(), said(command.err)
    assert (status, left) == (0, []), command.err
    assert_same(folder, wanted)
    assert lines == [INCOMPLETE]  # it still waits for its first answer, so it has warned of nothing
