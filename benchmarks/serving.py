"""What serving costs: `mnist-bn serve` beside a handler that does nothing, and what others use.

    python -m benchmarks.serving                    the tables of docs/serving.md, about 15 minutes
    python -m benchmarks.serving --quick            each figure once, for a second
    python -m benchmarks.serving --only "KServe SDK" --only "this server"
    python -m benchmarks.serving --json FILE        all rounds too, for a program

Run after `dvc repro`, from the repository root, on an idle machine of at least two cores, with the
extra `serve` and with `wrk` (Debian: apt-get install wrk). The servers run on one core and wrk on
another. KServe's SDK, MLServer and FastAPI are installed in .bench/ on the first run, from
benchmarks/serving_rivals/*.txt, by uv. Triton takes part where MNIST_BN_TRITONSERVER names a
`tritonserver` with a Python backend, as the wheel `nvidia-pytriton` brings one.

In a round every server is started, checked, loaded and ended. A cell of the table is one form
(JSON or raw tensors), one number of images a request and one number of connections; it is measured
on each server in turn before the next cell, so a busy moment of the machine hits them alike, and
the turn starts at another server each round. Eight different requests, of images of the test set,
are sent in turn. A server that others wait for is idle, but there.

A server whose answer is not that of ONNX Runtime is not timed, and a cell in which one request
fails has no figure. Exit status 1 says that there is such a server or cell, 2 that this server or
the handler that does nothing could not be measured; a time decides nothing, and a server of
others' that cannot be installed or started here is named with the reason.
"""

import argparse
import contextlib
import dataclasses
import http.client
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort
from tqdm import tqdm

from benchmarks.pipeline import processor
from benchmarks.serving_contenders import (
    CONTENDERS,
    NULL,
    OURS,
    Contender,
    Place,
    UnavailableError,
)
from benchmarks.serving_load import LoadError, find_wrk, load, write_script
from benchmarks.serving_processes import Server, StartError, core_time, free_port
from benchmarks.serving_table import Cell, Measured, Result, Results, disturbance, report
from benchmarks.serving_wire import BINARY, JSON, AnswerError, Float32, check
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.core.paths import MODELS, TEST_SPLIT

MODEL_FILE = MODELS / "bn.onnx"
CACHE = Path(".bench")
IMAGES, CONNECTIONS = (1, 32), (1, 8, 64)
REQUESTS = 8  # different ones, sent in turn
CELLS = tuple(
    Cell(form, images, connections)
    for form in (JSON, BINARY)
    for images in IMAGES
    for connections in CONNECTIONS
)
PACKAGES = ("onnxruntime", "uvicorn", "uvloop", "httptools")

BUSY = 0.05  # share of the servers' core that others may have
DIED = "it did not survive the load"
BROKEN = (AnswerError, LoadError, StartError, OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: of all.
        seconds: of each cell.
        server_core, load_core: where they run.
        cells: what to measure.
    """

    rounds: int = 3
    seconds: int = 3
    server_core: int = 0
    load_core: int = 1
    cells: Sequence[Cell] = CELLS


@dataclass(frozen=True)
class Work:
    """What the servers are asked.

    Attributes:
        images: float32 ``[REQUESTS * max(IMAGES), 784]``.
        model: the ONNX file.
    """

    images: Float32
    model: Path

    @cached_property
    def batches(self) -> Mapping[int, list[tuple[Float32, Float32]]]:
        """Images a request -> the requests' images with their logits by ONNX Runtime."""
        session = ort.InferenceSession(self.model, providers=["CPUExecutionProvider"])
        return {
            size: [
                (batch, session.run(["logits"], {"image": batch})[0])
                for batch in self.images[: size * REQUESTS].reshape(REQUESTS, size, -1)
            ]
            for size in IMAGES
        }


class Lane:
    """A server in a round."""

    def __init__(
        self, contender: Contender, result: Result, work: Work, options: Options, scratch: Path
    ) -> None:
        """Start it, and check its answers.

        Raises:
            AnswerError: One is wrong.
            StartError: It does not start.
        """
        self._contender = contender
        self._result = result
        self._work = work
        self._options = options
        self._scratch = scratch
        port = free_port()
        self._server = Server(contender.launch(port), port, options.server_core, scratch / "log")
        try:
            images, logits = work.batches[min(IMAGES)][0]
            start = self._server.wait(contender.dialect, images, logits)
            self.check()
        except BaseException:
            self._server.stop()
            raise
        result.starts.append(start)

    def check(self) -> None:
        """Compare every answer with ONNX Runtime's.

        Raises:
            AnswerError: One is wrong.
        """
        dialect = self._contender.dialect
        for form in dialect.forms:
            for batches in self._work.batches.values():
                for images, logits in batches:
                    check(self._server.port, dialect, images, logits, form)

    def measure(self, cell: Cell) -> None:
        """Measure a cell, if the server speaks its form.

        Raises:
            LoadError: The server is gone.
            StartError: It goes on working for ever.
        """
        dialect = self._contender.dialect
        if cell.form not in dialect.forms:
            return
        folder = self._scratch / f"{cell.form}-{cell.images}"
        if not folder.exists():
            folder.mkdir()
            batches = self._work.batches[cell.images]
            write_script(folder, [dialect.request(*batch, cell.form) for batch in batches])
        core = self._options.server_core
        before, busy_before = self._server.cpu(), core_time(core)
        seen = load(
            self._server.port,
            folder / "load.lua",
            cell.connections,
            self._options.seconds,
            self._options.load_core,
        )
        cpu, busy = self._server.cpu() - before, core_time(core) - busy_before
        self._result.cells.setdefault(cell, []).append(Measured(seen, cpu, busy - cpu))
        self._server.settle()

    def finish(self) -> None:
        """Note the memory, and check that the answers are still right.

        Raises:
            AnswerError: One is wrong.
        """
        self._result.memory.append(self._server.memory())
        self.check()

    def stop(self) -> None:
        """End the server."""
        self._server.stop()


class Benchmark:
    """All servers with what was measured of them."""

    def __init__(self, contenders: Sequence[Contender], work: Work, options: Options) -> None:
        """Measure nothing yet."""
        self.contenders = list(contenders)
        self.wrong = False  # whether an answer or a request was
        self.results = {
            one.name: Result(one.what, one.dialect.forms, one.packages) for one in contenders
        }
        self._work = work
        self._options = options

    @contextlib.contextmanager
    def _or_without(self, name: str, started: bool) -> Iterator[None]:
        """Leave a server out from now on if something goes wrong with it.

        Raises:
            UserError: It is one that the others are compared with.
        """
        try:
            yield
        except BROKEN as error:
            why = str(error).strip()
            self.wrong |= started or isinstance(error, AnswerError)
            if name in (OURS, NULL):
                raise UserError(f"{name}: {why}") from None
            sys.stderr.write(f"{name}: {why}\n")
            if isinstance(error, AnswerError):
                self.results[name].missing = why
            else:
                self.results[name].missing = DIED if started else "it does not start"

    def round(self, number: int, bar: Any) -> None:
        """Start every server, measure every cell on each in turn, end them."""
        lanes: dict[str, Lane] = {}
        with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for place, contender in enumerate(self.contenders):
                name = contender.name
                if self.results[name].missing:
                    continue
                bar.set_description(f"starting {name}")
                scratch = Path(folder) / str(place)
                scratch.mkdir()
                with self._or_without(name, started=False):
                    lane = Lane(contender, self.results[name], self._work, self._options, scratch)
                    stack.callback(lane.stop)
                    lanes[name] = lane
            for cell in self._options.cells:
                names = list(lanes)
                first = number % max(1, len(names))
                for name in names[first:] + names[:first]:
                    bar.set_description(f"{cell}: {name}")
                    with self._or_without(name, started=True):
                        lanes[name].measure(cell)
                    if self.results[name].missing:
                        del lanes[name]
                bar.update()
            for name, lane in lanes.items():
                with self._or_without(name, started=True):
                    lane.finish()

    def run(self) -> None:
        """Measure all rounds.

        Raises:
            UserError: This server or the null handler cannot be measured, or wrk fails.
        """
        total = self._options.rounds * len(self._options.cells)
        with tqdm(total=total, unit="cell", disable=None) as bar:
            for number in range(self._options.rounds):
                self.round(number, bar)
        self.wrong |= any(
            result.errors(cell) for result in self.results.values() for cell in result.cells
        )


def gather(names: Sequence[str], place: Place) -> tuple[list[Contender], dict[str, Result]]:
    """Install the servers.

    Returns:
        Those that are there, and results that say why of those that are not.

    Raises:
        UserError: This server or the null handler is not.
    """
    there, missing = [], {}
    for name in names:
        try:
            there.append(CONTENDERS[name](place))
        except UnavailableError as error:
            if name in (OURS, NULL):
                raise UserError(f"{name}: {error}") from None
            missing[name] = Result("", missing=str(error))
    return there, missing


def check_machine(options: Options) -> None:
    """Make sure that this machine can measure.

    Raises:
        UserError: It cannot.
    """
    if sys.platform != "linux":
        raise UserError("this benchmark reads Linux's /proc; run it on Linux")
    find_wrk()
    if not shutil.which("taskset"):
        raise UserError(
            "no `taskset` on the PATH; on Debian and Ubuntu: apt-get install util-linux"
        )
    cores = os.sched_getaffinity(0)
    wanted = {options.server_core, options.load_core}
    if len(wanted) < 2 or not wanted <= cores:
        raise UserError(
            f"--server-core {options.server_core} and --load-core {options.load_core} must be two "
            f"cores of those that this process may use: {', '.join(map(str, sorted(cores)))}"
        )
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            raise UserError(f"no {name} here: pip install 'mnist-batchnorm[serve]'") from None
    for path in (MODEL_FILE, TEST_SPLIT):
        if not path.exists():
            raise UserError(f"no {path} here; run from the project's folder, after `dvc repro`")


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Keep this process on a core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all servers")
    parser.add_argument("--seconds", type=int, default=3, metavar="N", help="of each cell")
    parser.add_argument("--quick", action="store_true", help="one round of one second")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(CONTENDERS),
        metavar="SERVER",
        help="; ".join(CONTENDERS),
    )
    parser.add_argument("--server-core", type=int, default=0, metavar="N")
    parser.add_argument("--load-core", type=int, default=1, metavar="N")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="of environments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all figures of all rounds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = options.seconds = 1
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    return options


def as_json(results: Results, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything, for a program."""
    return {
        "settings": dict(settings),
        "servers": {
            name: {
                "what": result.what,
                "missing": result.missing,
                "packages": result.packages,
                "start_seconds": result.starts,
                "resident_bytes": result.memory,
                "cells": [
                    dataclasses.asdict(cell)
                    | {"rounds": [dataclasses.asdict(one) for one in rounds]}
                    for cell, rounds in result.cells.items()
                ],
            }
            for name, result in results.items()
        },
    }


def main() -> int:
    """Parse the command line, measure, print Markdown."""
    arguments = parse_arguments()
    options = Options(
        arguments.rounds, arguments.seconds, arguments.server_core, arguments.load_core
    )
    try:
        check_machine(options)
        pixels = load_split(TEST_SPLIT).images[: REQUESTS * max(IMAGES)]
        work = Work(network_input(pixels), MODEL_FILE.resolve())
        with TemporaryDirectory() as folder:
            place = Place(Path.cwd(), work.model, arguments.cache, Path(folder))
            names = [name for name in CONTENDERS if name in (arguments.only or CONTENDERS)]
            contenders, missing = gather(names, place)
            machine = processor()
            benchmark = Benchmark(contenders, work, options)
            with on_core(options.load_core):  # checks leave the servers' core alone
                benchmark.run()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    results = {name: (benchmark.results | missing)[name] for name in names}
    usual, worst = disturbance(results)
    if usual > BUSY:
        sys.stderr.write(
            f"warning: other programs had {usual:.0%} of core {options.server_core}: these times "
            "are of no use\n"
        )
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(
        f"Medians of {options.rounds}, {options.seconds} s a cell; {machine}, the servers on "
        f"core {options.server_core}, wrk on core {options.load_core}; {packages}, "
        f"Python {platform.python_version()}; "
        f"other programs had {usual:.1%} of the servers' core in the median cell, "
        f"{worst:.1%} in the worst.\n"
    )
    print(report(results))
    if arguments.json:
        write_json(
            arguments.json, as_json(results, {"rounds": options.rounds, "seconds": options.seconds})
        )
    return 1 if benchmark.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
