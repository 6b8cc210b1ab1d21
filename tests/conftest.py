"""What tests of several modules share: the command line, and a slice of real MNIST made ready."""

import contextlib
import gc
import gzip
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from mnist_batchnorm import cli
from mnist_batchnorm.core.params import Params, PrepareParams, load_params
from mnist_batchnorm.stages.prepare import prepare
from tests.support import services, store

if TYPE_CHECKING:
    from mnist_batchnorm.network.model import Checkpoint

ROOT = Path(__file__).parent.parent
SLICE = ROOT / "tests/fixtures/mnist"

# as `make_deterministic` does: these networks are too small to share out, and xdist's workers,
# like the programs that tests start, share the cores already
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every run; no deadline, because the machine may be busy
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")


# A server takes seconds for each test: these show that both stores are alike, the others are slow.
SERVER_TESTS = (
    "test_runs_match_the_files",
    "test_versions_and_aliases_are_those_of_the_ledger",
    "test_run_holds_what_made_it",
    "test_runs_of_seeds_are_nested_in_one_over_all",
)


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        on_server = callspec and callspec.params.get("backend") == "server"
        if on_server and item.name.partition("[")[0] not in SERVER_TESTS:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def small_disk() -> Iterator[int]:
    """Let no file of this process grow past so many bytes, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def mount() -> Iterator[Callable[[Path, str], None]]:
    """Make a folder and mount a disk of a size on it."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    mounted: list[Path] = []

    def mount(place: Path, size: str) -> None:
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:  # a container without the right
            pytest.skip(f"no small disk can be mounted: {error}")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as filler:
        while True:
            filler.write(bytes(1024))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


MnistBn = Callable[..., Outcome]


@pytest.fixture
def mnist_bn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> MnistBn:
    """Run ``mnist-bn`` with arguments, in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mnist-bn", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        gc.enable()  # which a program that ends here needs no more
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds params.yaml and nothing else."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Shared]:
    """One MLflow server on PostgreSQL for all tests of this process."""
    with services.mlflow_on_postgres(tmp_path_factory.mktemp("server")) as shared:
        yield shared


@pytest.fixture(params=["sqlite", "server"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store: the default one, or a server on PostgreSQL over HTTP."""
    store.use_settings(monkeypatch)
    if request.param == "server":
        shared: services.Shared = request.getfixturevalue("shared_server")
        shared.empty()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", shared.uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds: the machine may be busy
    return str(request.param)


@pytest.fixture(scope="session")
def params() -> Params:
    """The committed params.yaml."""
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw files of the slice: 2,000 training and 500 test images."""
    folder = tmp_path_factory.mktemp("raw")
    for source in sorted(SLICE.glob("*.gz")):
        (folder / source.stem).write_bytes(gzip.decompress(source.read_bytes()))
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slice's splits, 1,800 train, 200 valid and 500 test images, and data.json."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(raw, folder, folder / "data.json", PrepareParams(valid_size=200, seed=0))
    return folder


def train_one_epoch(variant: str, prepared: Path, params: Params) -> "Checkpoint":
    """One of the two networks after an epoch on the slice."""
    import torch

    from mnist_batchnorm.network.model import Checkpoint
    from mnist_batchnorm.training.devices import DeviceSplit
    from mnist_batchnorm.training.loop import architecture, fit

    cpu = torch.device("cpu")
    train, valid = (
        DeviceSplit.load(prepared / f"{name}.safetensors", cpu) for name in ("train", "valid")
    )
    network = architecture(variant, params.train)
    model = network.build(params.train.seed)
    fit(model, train, valid, params.train.model_copy(update={"epochs": 1}))
    provenance = {
        "variant": variant,
        "train_sha256": "1" * 64,
        "params": params.train.model_dump(mode="json"),
        "device": "cpu",
    }
    return Checkpoint(network, model.state_dict(), provenance)


@pytest.fixture(scope="session")
def trained(prepared: Path, params: Params) -> "Checkpoint":
    """The batch-norm network after one epoch on the slice."""
    return train_one_epoch("bn", prepared, params)


@pytest.fixture(scope="session")
def trained_plain(prepared: Path, params: Params) -> "Checkpoint":
    """The network without batch norm after one epoch on the slice."""
    return train_one_epoch("plain", prepared, params)


@pytest.fixture(scope="session")
def weights(trained: "Checkpoint", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `trained`."""
    from mnist_batchnorm.network.model import save_checkpoint

    path = tmp_path_factory.mktemp("models") / "bn.safetensors"
    save_checkpoint(path, trained)
    return path


@pytest.fixture(scope="session")
def checkpoints(
    trained: "Checkpoint", trained_plain: "Checkpoint", tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The files of both networks by variant, in one folder."""
    from mnist_batchnorm.network.model import save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {variant: folder / f"{variant}.safetensors" for variant in ("bn", "plain")}
    for variant, checkpoint in (("bn", trained), ("plain", trained_plain)):
        save_checkpoint(paths[variant], checkpoint)
    return paths


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What training asks of PyTorch, taken back afterwards."""
    import torch

    from mnist_batchnorm.training.devices import make_deterministic

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that its end is restored too
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    threads = torch.get_num_threads()
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
