"""Seconds of a `dvc repro`, cold and warm, and of each stage: start-up against work.

    python benchmarks/pipeline.py              medians of three cold runs
    python benchmarks/pipeline.py --repeats 1  a quick look

Run after `dvc repro download`, from the repository root, on a machine that does nothing else. All
happens in a clone of the last commit in a temporary folder, with data/raw copied into it and with
a DVC cache and an MLflow store of its own: what is not committed is not measured, and nothing of
the project is touched.

Cold is `dvc repro --force` with that cache and store empty: every stage runs. Warm is a second
`dvc repro`, which finds nothing to do. Packages are compiled to bytecode, and in the system's file
cache, before the first run that counts.

A stage's total is from the start of its command to its end; what is left of the cold run is DVC's.
Start-up is a fresh Python's time to import every module that the stage's own process had asked for
by its end, in the same order; work is the rest of the total. What a stage's further processes
import counts as work, for it goes on beside it; a second table gives their start-up, alone on the
machine. The work of `verify` is the gate's time for both ONNX files. CPU seconds are those of all
processes on all cores, and the figure to go by where the machine has other things to do.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tqdm import tqdm

from mnist_batchnorm.core.paths import RAW

PACKAGES = ("dvc", "mlflow", "torch", "onnx", "onnxruntime", "matplotlib")

# Stands before the environment's `mnist-bn` on the PATH: notes what each call takes.
TIMER = """\
#!{python} -IS
import json, os, sys, time
start = time.perf_counter()
os.environ["BENCH_STAGE"] = " ".join(sys.argv[1:])
child = os.spawnv(os.P_NOWAIT, {program!r}, [{program!r}, *sys.argv[1:]])
_, status, used = os.wait4(child, 0)
cost = time.perf_counter() - start, used.ru_utime + used.ru_stime
with open({log!r}, "a") as stream:
    print(json.dumps([os.environ["BENCH_STAGE"], cost]), file=stream)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""

# Found as `sitecustomize` by every Python of a stage, in the one run that does not count: notes
# the modules it imports, one file a process, first the command. A module that is asked for is
# noted when the next one is, if it is there by then: some are optional and missing, or only looked
# for; and not every process comes to run what it has registered for its exit. With each stands
# whether the garbage collector was on, which slows large imports down.
LISTENER = """\
import atexit, gc, json, os, sys

class Listener:
    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        self.note()
        self.asked.append(name)

    def note(self):
        there = [name for name in self.asked if name in sys.modules]
        self.asked = [name for name in self.asked if name not in sys.modules]
        write(*(f"{{name}} {{gc.isenabled()}}" for name in there))

def write(*lines):
    with open(os.path.join({folder!r}, str(os.getpid())), "a") as stream:
        stream.writelines(line + "\\n" for line in lines)

if "BENCH_STAGE" in os.environ:
    write(json.dumps([os.environ["BENCH_STAGE"], sys.orig_argv]))
    listener = Listener()
    sys.meta_path.insert(0, listener)
    atexit.register(listener.note)
"""

# Imports the modules in such a file; one may have failed halfway.
IMPORTER = """\
import contextlib, gc, importlib, sys
with open(sys.argv[1]) as stream:
    command, *modules = stream.read().splitlines()
for name, collecting in map(str.split, modules):
    gc.enable() if collecting == "True" else gc.disable()
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""


@dataclass(frozen=True)
class Process:
    """A Python process of a stage.

    Attributes:
        stage: the arguments of ``mnist-bn``.
        command: the process's own command line.
        modules: file of those that it asked for, in order.
    """

    stage: str
    command: list[str]
    modules: Path

    @property
    def is_stage(self) -> bool:
        """Whether it is the stage's own process, the one that DVC waits for."""
        return Path(self.command[1]).name == "mnist-bn"


class Cost(NamedTuple):
    """What a command took: seconds that passed, and seconds of all its processes on the cores."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Timing:
    """What one cold run took, each of its stages, and a warm run after it."""

    cold: Cost
    warm: Cost
    stages: dict[str, Cost]


@dataclass
class Scratch:
    """A clone of the project's last commit, with everything that a run leaves behind inside.

    Attributes:
        root: of the project.
        folder: a temporary one, empty at first.
    """

    root: Path
    folder: Path
    project: Path = field(init=False)
    log: Path = field(init=False)
    processes: Path = field(init=False)

    def __post_init__(self) -> None:
        self.project = self.folder / "project"
        self.log = self.folder / "stages"
        self.processes = self.folder / "processes"
        scripts, listener = self.folder / "bin", self.folder / "listener"
        for folder in (self.processes, scripts, listener):
            folder.mkdir()
        run(["git", "clone", "--quiet", str(self.root), str(self.project)], self.folder)
        shutil.copytree(self.root / RAW, self.project / RAW)
        program = str(Path(sys.executable).parent / "mnist-bn")
        timer = scripts / "mnist-bn"
        timer.write_text(TIMER.format(python=sys.executable, program=program, log=str(self.log)))
        timer.chmod(0o755)
        customize = listener / "sitecustomize.py"
        customize.write_text(LISTENER.format(folder=str(self.processes)))

    def environment(self, *python_path: str) -> dict[str, str]:
        """Return the environment of a run: the clone's code, and no other store or cache."""
        own = ("DVC_", "MLFLOW_", "MNIST_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return kept | {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([*python_path, str(self.project / "src")]),
            "DVC_SITE_CACHE_DIR": str(self.folder / "dvc"),
        }

    def clean(self) -> None:
        """Bring the clone back to what it was before the first run, bytecode apart."""
        run(["git", "checkout", "--quiet", "."], self.project)
        keep = ("-e", RAW.as_posix(), "-e", "__pycache__")
        run(["git", "clean", "-dffxq", *keep], self.project)
        shutil.rmtree(self.folder / "dvc", ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def repro(self, *options: str, listen: bool = False) -> Cost:
        """Run `dvc repro` and return what it took."""
        listener = [str(self.folder / "listener")] if listen else []
        return run(["dvc", "repro", *options], self.project, self.environment(*listener))

    def listen(self) -> list[Process]:
        """Run every stage once, and return what its processes imported."""
        self.clean()
        self.repro("--force", listen=True)
        found = []
        for path in sorted(self.processes.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            stage, command = json.loads(path.read_text().partition("\n")[0])
            found.append(Process(stage, command, path))
        return found

    def measure(self) -> Timing:
        """Time a cold run and a warm one."""
        self.clean()
        cold = self.repro("--force")
        lines = map(json.loads, self.log.read_text().splitlines())
        stages = {stage: Cost(*cost) for stage, cost in lines}
        return Timing(cold, self.repro(), stages)

    def start_up(self, process: Process) -> Cost:
        """Time a fresh Python that imports what the process did, and does nothing."""
        command = [sys.executable, "-W", "ignore", "-c", IMPORTER, str(process.modules)]
        return run(command, self.project, self.environment())


def run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command that must succeed, and return what it took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def median(costs: Iterable[Cost]) -> Cost:
    """Return the median of each of the two."""
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


def dvc_itself(timing: Timing) -> Cost:
    """Return what a cold run took beside its stages."""
    stages = [sum(costs) for costs in zip(*timing.stages.values(), strict=True)]
    return Cost(*(whole - part for whole, part in zip(timing.cold, stages, strict=True)))


def print_stages(timings: list[Timing], start_ups: Mapping[str, list[Cost]]) -> None:
    """Print a row a stage, in the order they ran, then DVC's part and the whole."""
    print("| stage | start-up s | work s | total s | start-up CPU s | work CPU s | total CPU s |")
    print("|---|---|---|---|---|---|---|")
    for stage in timings[0].stages:
        start_up = median(start_ups[stage])
        total = median(timing.stages[stage] for timing in timings)
        pairs = zip(start_up, total, strict=True)
        cells = [f"{part:.2f} | {whole - part:.2f} | {whole:.2f}" for part, whole in pairs]
        print(f"| {stage} | {' | '.join(cells)} |")
    rows = {
        "DVC itself": median(map(dvc_itself, timings)),
        "**cold `dvc repro`**": median(timing.cold for timing in timings),
        "warm `dvc repro`": median(timing.warm for timing in timings),
    }
    for name, cost in rows.items():
        print(f"| {name} | | | {cost.wall:.2f} | | | {cost.cpu:.2f} |")


def print_others(processes: list[Process], start_ups: Mapping[int, list[Cost]]) -> None:
    """Print a row for each further process of a stage."""
    print("\n| stage | further process | start-up s | CPU s |\n|---|---|---|---|")
    for number, costs in start_ups.items():
        process, cost = processes[number], median(costs)
        command = shlex.join(process.command[1:])
        shown = command if len(command) < 60 else command[:57] + "..."
        print(f"| {process.stage} | `{shown}` | {cost.wall:.2f} | {cost.cpu:.2f} |")


def processor() -> str:
    """Return the processor's name and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        models = [value.strip() for key, _, value in fields if key.strip() == "model name"]
        name = models[0] if models else name
    return f"{name}, {cores} cores"


def main() -> None:
    """Parse the command line, run the pipeline, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="cold runs")
    options = parser.parse_args()
    timings: list[Timing] = []
    stages: dict[str, list[Cost]] = defaultdict(list)
    others: dict[int, list[Cost]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        scratch = Scratch(Path.cwd(), Path(folder))
        with tqdm(total=1 + options.repeats, unit="run") as bar:
            processes = scratch.listen()
            bar.update()
            for _ in range(options.repeats):
                timings.append(scratch.measure())
                for number, process in enumerate(processes):
                    cost = scratch.start_up(process)
                    if process.is_stage:
                        stages[process.stage].append(cost)
                    else:
                        others[number].append(cost)
                bar.update()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"medians of {options.repeats}, {processor()}, {platform.system()}")
    print(f"Python {platform.python_version()}, {versions}\n")
    print_stages(timings, stages)
    if others:
        print_others(processes, others)


if __name__ == "__main__":
    main()
