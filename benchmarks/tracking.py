"""What tracking costs training: seconds of `mnist-bn train`, untracked and with any tracker.

    python -m benchmarks.tracking              medians of three rounds
    python -m benchmarks.tracking --rounds 1   a quick look

Run after `dvc repro prepare`, from the repository root, on an idle machine. The trainings are those
of params.yaml, both networks as the command trains them, on data/prepared; what they write is in a
temporary folder, and nothing of the project is touched.

A round runs every row once, so a busy moment of the machine hits them alike. Each round has another
seed: its results are new to every store, and each row's weights are compared with those of the
round's untracked row. That row is the same command without the process beside it, as when that
process cannot start. The server that works is on this
machine too, so its share of the cores counts.

What is measured is the whole command, from start to exit. Allowed is what the tracker promises: a
median of at most 5 % and 2 s more than the untracked row's. Exit status 1 says that a training
had other weights, 2 that one failed; a time decides nothing.
"""

import argparse
import contextlib
import http.server
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML
from scripts.browser import BrowserError, serving
from tqdm import tqdm

from benchmarks.pipeline import processor
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import DVC_FILE, MODELS, PARAMS_FILE, PREPARED, VARIANTS
from mnist_batchnorm.training.devices import describe_device, resolve_device

SHARE, SECONDS = 0.05, 2.0  # what tracking may cost
LIMIT = 3600.0  # seconds until a training counts as one that hangs
PACKAGES = ("mlflow", "torch")

UNTRACKED = """\
import contextlib
from mnist_batchnorm import cli
from mnist_batchnorm.stages import train
from mnist_batchnorm.training.live import LiveRuns

@contextlib.contextmanager
def live_runs():
    yield LiveRuns(None)

train.live_runs = live_runs
cli.main()
"""

# an MLflow of its own, which imports for seconds, stays out of this process
CREATE = """\
import sys
from pathlib import Path
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.mlflow_sync.run_store import RunStore
RunStore.open(load_params().sync.experiment, Path(sys.argv[1]))
"""

# What training says about its tracker, and how the table puts it.
SAID = {"warning": re.compile(r"^warning: MLflow ", re.M), "pending": re.compile(r"^MLflow ", re.M)}


# --- trackers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def down() -> Iterator[str]:
    """The address of a server that is down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def paused() -> Iterator[str]:
    """The address of a server that takes requests and never answers, as one does on SIGSTOP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers every request with 500."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_error(500)

    do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def failing() -> Iterator[str]:
    """The address of a server that answers 500."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: as the table shows it.
        server: the tracker, if it is one.
        tracked: whether there is a tracker.
        database: whether the default store is there before training.
    """

    name: str
    server: "Callable[[Path], contextlib.AbstractContextManager[str]] | None" = None
    tracked: bool = True
    database: bool = False


def working(folder: Path) -> "contextlib.AbstractContextManager[str]":
    """The address of a real server on a database in a folder."""
    return serving(f"sqlite:///{folder / 'server.db'}", folder)


ROWS = (
    Row("untracked", tracked=False),
    Row("`mlflow.db`", database=True),
    Row("`mlflow.db`, not there yet"),
    Row("server", server=working),
    Row("server down", server=lambda _: down()),
    Row("server paused", server=lambda _: paused()),
    Row("server answers 500", server=lambda _: failing()),
)


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What one training took and left.

    Attributes:
        seconds: from its start to its exit.
        weights: SHA-256 of each network's file.
        said: the keys of `SAID` that it wrote to standard error, once for each time.
    """

    seconds: float
    weights: tuple[str, ...]
    said: tuple[str, ...]


class Scratch:
    """A folder to train in, as the project's, with nothing that another training left."""

    def __init__(self, root: Path, folder: Path, device: str) -> None:
        """Make it.

        Args:
            root: of the project.
            folder: a temporary one, empty at first.
            device: to train on.
        """
        self.root = root
        self.folder = folder
        self.project = folder / "project"
        self.empty = folder / "mlflow.db"
        self._device = device
        others = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
        self._environment = {**others, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.project.mkdir()
        shutil.copy(root / PARAMS_FILE, self.project)
        subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-W", "ignore", "-c", CREATE, str(folder)],
            cwd=self.project,
            env=self._environment,
            timeout=LIMIT,
            check=True,
        )

    def clean(self, seed: int, database: bool) -> None:
        """Bring it to the state before a training."""
        shutil.rmtree(self.project)
        (self.project / PREPARED.parent).mkdir(parents=True)
        for path in (Path("src"), PREPARED, DVC_FILE):
            (self.project / path).symlink_to(self.root / path)
        yaml = YAML()
        params = yaml.load(self.root / PARAMS_FILE)
        params["train"].update(seed=seed, device=self._device)
        yaml.dump(params, self.project / PARAMS_FILE)
        if database:
            shutil.copy(self.empty, self.project)

    def train(self, row: Row, seed: int, uri: str | None) -> Measured:
        """Train both networks and measure that.

        Raises:
            UserError: The training fails.
        """
        self.clean(seed, row.database)
        program = [str(Path(sys.executable).parent / "mnist-bn")]
        command = program if row.tracked else [sys.executable, "-P", "-c", UNTRACKED]
        where = {"MLFLOW_TRACKING_URI": uri} if uri else {}
        log = self.folder / "log"
        with log.open("wb") as stream:
            start = time.perf_counter()
            done = subprocess.run(  # noqa: S603
                [*command, "train"],
                cwd=self.project,
                env=self._environment | where,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=LIMIT,
                check=False,
            )
            seconds = time.perf_counter() - start
        told = log.read_text(errors="replace")
        if done.returncode:
            raise UserError(f"{row.name}: `mnist-bn train` failed:\n{told}")
        weights = tuple(digest(self.project / MODELS / f"{v}.safetensors") for v in VARIANTS)
        said = [name for name, pattern in SAID.items() for _ in pattern.findall(told)]
        return Measured(seconds, weights, tuple(said))


def measure(scratch: Scratch, rounds: int, seed: int) -> Mapping[Row, list[Measured]]:
    """Run every row in turn, again and again."""
    results: dict[Row, list[Measured]] = defaultdict(list)
    with (
        contextlib.ExitStack() as servers,
        tqdm(total=1 + rounds * len(ROWS), unit="run", disable=None) as bar,
    ):
        uris = {
            row: servers.enter_context(row.server(scratch.folder)) for row in ROWS if row.server
        }
        # once in vain: bytecode and the system's file cache, MLflow's too
        scratch.train(ROWS[1], seed, None)
        bar.update()
        for number in range(rounds):
            for row in ROWS:
                bar.set_description(row.name)
                results[row].append(scratch.train(row, seed + number, uris.get(row)))
                bar.update()
    return results


# --- the table ------------------------------------------------------------------------------------

HEAD = (
    "tracker",
    "median, s",
    "more than untracked, s",
    "allowed, s",
    "within",
    "weights",
    "said on stderr",
)


def identical(row: list[Measured], untracked: list[Measured]) -> bool:
    """Tell whether every round of a row has the weights of the round's untracked training."""
    return [one.weights for one in row] == [one.weights for one in untracked]


def table_row(name: str, row: list[Measured], untracked: list[Measured]) -> str:
    """Format a row."""
    base, seconds = (
        statistics.median(one.seconds for one in repeats) for repeats in (untracked, row)
    )
    cells = [name, f"{seconds:.2f}"]
    if row is untracked:
        return f"| {' | '.join([*cells, *[''] * (len(HEAD) - len(cells))])} |"
    more, allowed = seconds - base, SHARE * base + SECONDS
    kinds = sorted({one.said for one in row}, key=len)
    said = " or ".join(", ".join(f"1 {name}" for name in kind) or "nothing" for kind in kinds)
    cells += [f"{more:+.2f}", f"{allowed:.2f}", "yes" if more <= allowed else "**no**"]
    cells += ["identical" if identical(row, untracked) else "**other**", said]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Parse the command line, train, print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    root = Path.cwd()
    try:
        for path in (Path("src"), PREPARED, DVC_FILE):
            if not path.exists():
                raise UserError(f"no {path} here; run from the project's folder, after `dvc repro`")
        params = load_params().train
        device = describe_device(resolve_device(options.device))
        with TemporaryDirectory() as folder:
            results = measure(
                Scratch(root, Path(folder), options.device), options.rounds, params.seed
            )
    except (UserError, BrowserError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(
        f"{params.epochs} epochs of both networks, medians of {options.rounds}; {device}, "
        f"{processor()}; {versions}, Python {platform.python_version()}\n"
    )
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    untracked = results[ROWS[0]]
    for row, measured in results.items():
        print(table_row(row.name, measured, untracked))
    return 0 if all(identical(row, untracked) for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
