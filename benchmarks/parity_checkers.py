"""Public checkers of ONNX exports and this project's gate, on the same bad and honest exports.

    python -m benchmarks.parity_checkers            the table of docs/parity.md
    python -m benchmarks.parity_checkers --verbose  and what each one misses or stops

Run after `dvc repro`, from the repository root, with the packages of the extra `bench` (in
`requirements.lock`, so `make setup` brings them). The bad exports are tests.support.mutants of
models/bn.safetensors, the honest ones tests/parity/honest.py of it and of networks trained like
it from other seeds; real inputs are the test images.

A checker catches a file when it objects to it in whatever way it has, an exception included: who
uses it notices. The same from an honest file is a false alarm.
"""

import argparse
import contextlib
import itertools
import logging
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import mock

import mlflow
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime as ort
import torch
from optimum.exporters.onnx import OnnxConfig, validate_model_outputs
from optimum.utils import NormalizedConfig
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CompareFunc, DataLoader
from polygraphy.logger import G_LOGGER
from safetensors.torch import save_file
from tests.support.honest_exports import HONEST, make_honest
from tests.support.mutants import mutants_of
from tests.support.parity_cases import INPUT, OUTPUT, Case, mlp, provenance
from torch import nn
from torch.onnx.testing import assert_onnx_program
from torch.onnx.verification import verify_onnx_program
from tqdm import tqdm

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import CHECKPOINT, PREPARED, TEST_SPLIT
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.parity import Gate
from mnist_batchnorm.training.devices import DeviceSplit, make_deterministic
from mnist_batchnorm.training.loop import architecture, fit

Float32 = npt.NDArray[np.float32]

SMALL, LARGE = 32, 10_000  # images a batch
SEEDS = range(1, 6)
NETWORKS = 10  # whose honest exports are judged: models/bn.safetensors and others
GAINS = (4.0, 1.0)  # of the others' initial weights, in turn
GATE_IMAGES = 1_000  # real ones for the gate, beside the inputs that it makes itself
EXPORTER_LOG = "torch.onnx._internal.exporter._core"  # where verify=True says what it found
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "mlflow", "polygraphy", "optimum-onnx")


class ObjectionError(Exception):
    """A checker that answers, instead of raising, is not content."""


@dataclass(frozen=True)
class Network:
    """What a file should be, in the forms that checkers take it in.

    Attributes:
        case: the network with its checkpoint, real inputs and labels.
    """

    case: Case

    @cached_property
    def captured(self) -> torch.export.ExportedProgram:
        """It, as torch.export captures it, with a symbolic batch axis."""
        example = torch.from_numpy(self.images(2))
        batch = ({0: torch.export.Dim("batch")},)
        return torch.export.export(self.case.model, (example,), dynamic_shapes=batch)

    @cached_property
    def gate(self) -> Gate:
        """This project's gate for it, which reads the weights from their file."""
        inputs, labels = self.images(GATE_IMAGES), self.case.labels[:GATE_IMAGES]
        return Gate(self.case.weights, model=self.case.architecture, inputs=inputs, labels=labels)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of a batch of inputs."""
        return (batch, *self.case.inputs.shape[1:])

    def images(self, batch: int) -> Float32:
        """The first test images."""
        return self.case.inputs[:batch]

    def logits(self, inputs: Float32) -> Float32:
        """What PyTorch computes for some inputs, in one batch."""
        with torch.inference_mode():
            computed: Float32 = self.case.model(torch.from_numpy(inputs)).numpy()
        return computed


@dataclass(frozen=True)
class Export:
    """A file to judge.

    Attributes:
        name: of its kind.
        path: the ONNX file.
        network: what it should be.
        verified: what `torch.onnx.export(verify=True)` logged about its making; None where that
            was no call of PyTorch's current exporter, so that there was nothing to verify.
    """

    name: str
    path: Path
    network: Network
    verified: list[str] | None

    @property
    def program(self) -> torch.onnx.ONNXProgram:
        """The file, as if it had just been exported from the network."""
        return torch.onnx.ONNXProgram(onnx_ir.load(self.path), self.network.captured)


@cache
def normal(shape: tuple[int, ...], seed: int) -> Float32:
    """Draw inputs as ``torch.randn`` in PyTorch's tutorials does."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@cache
def uniform(shape: tuple[int, ...], seed: int) -> Float32:
    """Draw inputs as optimum's generators of dummy images do."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@dataclass(frozen=True)
class Setting:
    """How a checker is used: images a batch, 0 where it chooses its own, and the inputs' seed."""

    batch: int
    seed: int = SEEDS[0]


ONCE = (Setting(0),)
IMAGES = (Setting(SMALL), Setting(LARGE))
RANDOM = (*(Setting(SMALL, seed) for seed in SEEDS), Setting(LARGE))


@dataclass
class Checker:
    """A way to judge an export, and what came of it.

    Attributes:
        name: as the table shows it.
        inputs: what it compares on, as the table shows it.
        judge: raises when it objects to an export.
        settings: how it is used, once each.
        objections: for each setting, the names of what it objected to, and why.
        seconds: spent in `judge`.
    """

    name: str
    inputs: str
    judge: Callable[[Export, Setting], None]
    settings: Sequence[Setting]
    objections: dict[Setting, dict[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, exports: Sequence[Export], progress: "tqdm[Any]") -> None:
        """Judge all exports in all settings."""
        for setting, export in itertools.product(self.settings, exports):
            objections = self.objections.setdefault(setting, {})
            started = time.perf_counter()
            try:
                with quiet():
                    self.judge(export, setting)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is noticed
                objections[export.name] = f"{type(error).__name__}: {error}"
            self.seconds += time.perf_counter() - started
            progress.update()

    def counts(self, names: set[str]) -> str:
        """Count the objections to exports: at the small batch, as a range over seeds, / large."""
        by_batch: dict[int, list[int]] = {}
        for setting, objections in self.objections.items():
            by_batch.setdefault(setting.batch, []).append(len(objections.keys() & names))
        spans = [sorted({min(found), max(found)}) for found in by_batch.values()]
        return " / ".join(" to ".join(map(str, span)) for span in spans)

    def objected(self, *batches: int) -> set[str]:
        """Return the names of what it objected to at some batches."""
        chosen = (found for setting, found in self.objections.items() if setting.batch in batches)
        return set().union(*chosen)


# --- the checkers -------------------------------------------------------------------------------


def session(export: Export) -> ort.InferenceSession:
    """Load the file as most do."""
    return ort.InferenceSession(export.path, providers=["CPUExecutionProvider"])


def onnx_logits(export: Export, inputs: Float32) -> Float32:
    """What ONNX Runtime computes, as the tutorials call it: by the first input and output."""
    run = session(export)
    logits: Float32 = run.run(None, {run.get_inputs()[0].name: inputs})[0]
    return logits


def check_onnx(export: Export, _: Setting) -> None:
    """Ask onnx.checker, with shape inference."""
    onnx.checker.check_model(export.path, full_check=True)


def check_mlflow(export: Export, _: Setting) -> None:
    """Do what `mlflow.onnx.log_model` does with a model, its signature and an input example.

    It saves the model, and predicts the example with what it saved; a failure of that is only
    logged. `load_model`, with which people get it back, runs onnx.checker.
    """
    example = export.network.images(3)
    signature = mlflow.models.infer_signature(example, export.network.logits(example))
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        mlflow.onnx.save_model(
            onnx.load(export.path),
            folder,
            signature=signature,
            input_example=example,
            save_as_external_data=False,
            pip_requirements=["onnx", "onnxruntime"],  # asked, it starts a process to find out
        )
        mlflow.pyfunc.load_model(folder).predict(example)
        mlflow.onnx.load_model(folder)


def check_accuracy(export: Export, setting: Setting) -> None:
    """Compare accuracy on all test images, in batches."""
    run, case = session(export), export.network.case
    name = run.get_inputs()[0].name
    parts = [
        run.run(None, {name: case.inputs[i : i + setting.batch]})[0]
        for i in range(0, len(case.inputs), setting.batch)
    ]
    found, expected = (
        (logits.argmax(axis=1) == case.labels).mean()
        for logits in (np.concatenate(parts), export.network.logits(case.inputs))
    )
    if abs(found - expected) > 0.001:
        raise ObjectionError(f"accuracy {found} instead of {expected}")


def assert_allclose(export: Export, inputs: Float32) -> None:
    """Compare as PyTorch's tutorial on ONNX Runtime does, with its tolerances."""
    np.testing.assert_allclose(
        export.network.logits(inputs), onnx_logits(export, inputs), rtol=1e-3, atol=1e-5
    )


def assert_close(export: Export, inputs: Float32) -> None:
    """Compare as PyTorch's tutorial on the current exporter does: float32's 1.3e-6 and 1e-5."""
    torch.testing.assert_close(
        torch.from_numpy(export.network.logits(inputs)), torch.tensor(onnx_logits(export, inputs))
    )


def assert_program(export: Export, inputs: Float32) -> None:
    """Ask `torch.onnx.testing`; how the program was captured is not the file's matter."""
    assert_onnx_program(export.program, args=(torch.from_numpy(inputs),), strategy=None)


def verify_program(export: Export, inputs: Float32) -> None:
    """Ask `torch.onnx.verification`, which measures; the limits are those of verify=True."""
    for found in verify_onnx_program(export.program, (torch.from_numpy(inputs),)):
        if found.max_abs_diff >= 5e-3 or found.max_rel_diff >= 1e-1:
            raise ObjectionError(f"{found.name}: {found.max_abs_diff}, {found.max_rel_diff}")


def check_verified(export: Export, _: Setting) -> None:
    """Look at what verify=True logged when the export was made; it never raises."""
    if export.verified:
        raise ObjectionError("; ".join(export.verified))


class NetworkRunner(BaseRunner):  # type: ignore[misc] # polygraphy has no types
    """Polygraphy's way to run anything else; its own runner of PyTorch insists on CUDA."""

    def __init__(self, network: Network) -> None:
        super().__init__(prefix="network")
        self.network = network

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Tell what inputs it takes."""
        _, *shape = self.network.case.inputs.shape
        return TensorMetadata().add(INPUT, np.float32, (None, *shape))

    def infer_impl(self, feed_dict: dict[str, Float32]) -> dict[str, Float32]:
        """Compute the logits."""
        started = time.perf_counter()
        outputs = {OUTPUT: self.network.logits(feed_dict[INPUT])}
        self.inference_time = time.perf_counter() - started
        return outputs


def compare_polygraphy(export: Export, loader: Any) -> None:
    """Compare with Polygraphy's defaults: each number within 1e-5, absolute or relative."""
    runners = [OnnxrtRunner(SessionFromOnnx(str(export.path))), NetworkRunner(export.network)]
    results = Comparator.run(runners, data_loader=loader)
    if not Comparator.compare_accuracy(results, compare_func=CompareFunc.simple()):
        raise ObjectionError("polygraphy")


def polygraphy_random(export: Export, setting: Setting) -> None:
    """Let Polygraphy draw its inputs: uniform on [0, 1), of the shape that the file declares."""
    metadata = TensorMetadata().add(INPUT, np.float32, export.network.shape(setting.batch))
    compare_polygraphy(export, DataLoader(seed=setting.seed, input_metadata=metadata))


def polygraphy_images(export: Export, setting: Setting) -> None:
    """Give Polygraphy the test images."""
    compare_polygraphy(export, [{INPUT: export.network.images(setting.batch)}])


class Classifier(OnnxConfig):  # type: ignore[misc] # optimum's types are not followed
    """What optimum needs to know about a model that is not one of transformers'."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    inputs: ClassVar = {INPUT: {0: "batch"}}
    outputs: ClassVar = {OUTPUT: {0: "batch"}}

    def __init__(self, example: Float32) -> None:
        super().__init__(config=None, task="image-classification")
        self.example = example

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, torch.Tensor]:
        """Hand out the inputs to compare on."""
        return {INPUT: torch.from_numpy(self.example)}


class Named(nn.Module):
    """A network that takes its input by name, as optimum hands it over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Compute the logits of ``image``, which is what `INPUT` says."""
        logits: torch.Tensor = self.model(image)
        return logits


def validate_optimum(export: Export, inputs: Float32, atol: float | None = None) -> None:
    """Ask optimum's validator, which checks names and dynamic axes as well."""
    validate_model_outputs(
        Classifier(inputs),
        Named(export.network.case.model),
        export.path,
        [OUTPUT],
        atol=atol,
        use_subprocess=False,
    )


def run_gate(export: Export, _: Setting) -> None:
    """Ask this project's gate."""
    weights = export.network.case.weights.read_bytes()
    report = export.network.gate.check(
        export.path, input_name=INPUT, output_name=OUTPUT, provenance=provenance(weights)
    )
    if not report.parity:
        raise ObjectionError(report.table())


def comparisons(
    name: str,
    compare: Callable[[Export, Float32], None],
    draw: Callable[[tuple[int, ...], int], Float32] = normal,
) -> Iterator[Checker]:
    """Yield the two ways to use a comparison of outputs: random inputs, test images."""

    def on_random(export: Export, setting: Setting) -> None:
        compare(export, draw(export.network.shape(setting.batch), setting.seed))

    def on_images(export: Export, setting: Setting) -> None:
        compare(export, export.network.images(setting.batch))

    yield Checker(name, draw.__name__, on_random, RANDOM)
    yield Checker(name, "images", on_images, IMAGES)


def public_checkers() -> list[Checker]:
    """List the public checkers."""
    return [
        Checker("onnx.checker, full_check", "", check_onnx, ONCE),
        Checker("torch.onnx.export(verify=True)", "its example", check_verified, ONCE),
        Checker("MLflow: log_model, load_model", "3 images", check_mlflow, ONCE),
        Checker("accuracy within 0.1 %", "images", check_accuracy, IMAGES),
        *comparisons("torch.onnx.verification.verify_onnx_program", verify_program),
        Checker("Polygraphy, CompareFunc.simple", "uniform", polygraphy_random, RANDOM),
        Checker("Polygraphy, CompareFunc.simple", "images", polygraphy_images, IMAGES),
        *comparisons("optimum, atol 1e-3", partial(validate_optimum, atol=1e-3), uniform),
        *comparisons("optimum, atol 1e-5 (default)", validate_optimum, uniform),
        *comparisons("numpy assert_allclose, rtol 1e-3, atol 1e-5", assert_allclose),
        *comparisons("torch.testing.assert_close", assert_close),
        *comparisons("torch.onnx.testing.assert_onnx_program", assert_program),
    ]


# --- the suite ----------------------------------------------------------------------------------


def train(seed: int, gain: float, epochs: int) -> nn.Sequential:
    """Train a network as `dvc repro` does, from initial weights that are ``gain`` times its."""
    params = load_params().train.model_copy(update={"seed": seed, "epochs": epochs})
    device = torch.device("cpu")
    images, valid = (
        DeviceSplit.load(PREPARED / f"{name}.safetensors", device) for name in ("train", "valid")
    )
    model = architecture("bn", params).build(seed)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= gain
    fit(model, images, valid, params)
    return model


def real_case(folder: Path) -> Case:
    """Load the network and the test images that `dvc repro` leaves.

    Args:
        folder: where a copy of the checkpoint goes: mutants may write beside it.

    Raises:
        UserError: They are missing, or the network is not the one that the mutants know.
    """
    model = load_checkpoint(CHECKPOINT).model()
    if str(model) != str(mlp()):
        raise UserError(f"{CHECKPOINT}: the mutants are of {mlp()}, not of {model}")
    split, params = load_split(TEST_SPLIT), load_params().train
    return Case(
        name="mlp",
        seed=params.seed,
        gain=1.0,
        model=model,
        earlier=train(params.seed, 1.0, max(params.epochs // 2, 1)).state_dict(),
        weights=Path(shutil.copy(CHECKPOINT, folder)),
        inputs=network_input(split.images),
        labels=split.labels,
    )


def other_cases(real: Case, folder: Path) -> Iterator[Case]:
    """Train the network from other seeds, every other time with larger initial weights."""
    epochs = load_params().train.epochs
    for i, gain in zip(range(1, NETWORKS), itertools.cycle(GAINS), strict=False):
        seed = real.seed + i
        model = train(seed, gain, epochs)
        weights = folder / f"{seed}.safetensors"
        save_file(model.state_dict(), weights)
        yield replace(real, seed=seed, gain=gain, model=model, weights=weights)


class Findings(logging.Handler):
    """Keeps what verify=True has to say: it only logs.

    Attributes:
        calls: of PyTorch's current exporter, each with verify=True.
        messages: what they found.
    """

    SIGNS = ("large absolute difference", "large relative difference", "fails ONNX checker")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message if it is a finding."""
        message = record.getMessage()
        if any(sign in message for sign in self.SIGNS):
            self.messages.append(message)


@contextlib.contextmanager
def verified_exports() -> Iterator[Findings]:
    """Have PyTorch's current exporter verify what it exports."""
    findings = Findings()
    export = torch.onnx.export

    def verified(*arguments: Any, **options: Any) -> Any:
        if options.get("dynamo", True):  # the exporter that traces ignores verify=
            findings.calls += 1
            options["verify"] = True
        return export(*arguments, **options)

    log = logging.getLogger(EXPORTER_LOG)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.WARNING)  # whatever who exports has set for its parents
    log.propagate = False
    log.addHandler(findings)
    try:
        with mock.patch("torch.onnx.export", verified):
            yield findings
    finally:
        log.removeHandler(findings)
        log.setLevel(level)
        log.propagate = propagate


def make_export(
    name: str, make: Callable[[Case, Path], Path], network: Network, folder: Path
) -> Export:
    """Make a file in a folder of its own."""
    place = folder / name
    place.mkdir()
    with verified_exports() as findings:
        path = make(network.case, place)
    return Export(name, path, network, findings.messages if findings.calls else None)


def bad_exports(case: Case, folder: Path) -> list[Export]:
    """Make every bad export of a case."""
    for honest in (case.kept, case.folded, case.legacy):
        honest()  # most start from one of these, which is made once, and not by them
    network = Network(case)
    return [
        make_export(mutant.name, mutant.make, network, folder)
        for mutant in tqdm(mutants_of(case.name), "bad exports", disable=None)
    ]


def honest_exports(cases: Iterable[Case], folder: Path) -> list[Export]:
    """Make every honest export of each case."""
    return [
        make_export(f"{name}-{case.seed}", partial(make_honest, name), network, folder)
        for case in tqdm(cases, "honest exports", total=NETWORKS, disable=None)
        for network in [Network(case)]
        for name in HONEST
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what checkers print, log and warn of."""
    stderr = os.dup(2)
    logging.disable()
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(action="ignore"),
        G_LOGGER.verbosity(G_LOGGER.CRITICAL),
    ):
        os.dup2(nowhere.fileno(), 2)  # ONNX Runtime writes there without asking Python
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            logging.disable(logging.NOTSET)


# --- the table ----------------------------------------------------------------------------------


def print_heading(bad: Sequence[Export], honest: Sequence[Export]) -> None:
    """Print what is judged, by what, how to read the table, and its head."""
    seen = sum(export.verified is not None for export in bad)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    paragraphs = (
        f"{len(bad)} bad exports of {CHECKPOINT}; {len(honest)} honest exports of it and of "
        f"{NETWORKS - 1} networks trained like it. {versions}; Python {platform.python_version()}, "
        f"{platform.machine()}.",
        f"Two figures: batches of {SMALL} / of {LARGE:,} images. A range: over random inputs from "
        f"seeds {SEEDS[0]} to {SEEDS[-1]}. verify=True sees what PyTorch's current exporter makes "
        f"while it makes it, not a file: it ran for {seen} of the bad exports, and has nothing to "
        "say about the others.",
    )
    for paragraph in paragraphs:
        print(textwrap.fill(paragraph, 100), end="\n\n")
    print(f"| checker | inputs | caught of {len(bad)} | false alarms of {len(honest)} | seconds |")
    print("|---|---|---|---|---|", flush=True)


def print_row(checker: Checker, bad: set[str], honest: set[str]) -> None:
    """Print what a checker caught and what it stopped."""
    cells = [checker.name, checker.inputs, checker.counts(bad), checker.counts(honest)]
    print(f"| {' | '.join(cells)} | {checker.seconds:.0f} |", flush=True)


def print_together(checkers: list[Checker], bad: set[str], honest: set[str]) -> None:
    """Print what the checkers find between them, and what those settings do that never err.

    A setting that stops honest exports of the very network whose mutants it is to catch may
    object to everything; the second row leaves such catches out.
    """
    seconds = sum(checker.seconds for checker in checkers)
    found = [checker.objected(0, SMALL) for checker in checkers]
    found_large = [checker.objected(0, LARGE) for checker in checkers]
    small, large = set().union(*found), set().union(*found_large)
    caught, alarms = (f"{len(small & part)} / {len(large & part)}" for part in (bad, honest))
    print(f"| all of these | | {caught} | {alarms} | {seconds:.0f} |")
    never_err = [
        objections.keys()
        for checker in checkers
        for objections in checker.objections.values()
        if not objections.keys() & honest
    ]
    print(
        f"| all of these, in settings without a false alarm | | "
        f"{len(bad.intersection(set().union(*never_err)))} | 0 | |",
        flush=True,
    )


def print_misses(checker: Checker, bad: set[str], honest: set[str]) -> None:
    """Print what a checker never caught at the small batch, and what it stopped at any."""
    missed = bad - checker.objected(0, SMALL)
    stopped = honest & checker.objected(0, SMALL, LARGE)
    print(f"\n{checker.name} ({checker.inputs})")
    print(f"  missed {len(missed)}: {', '.join(sorted(missed))}")
    print(f"  stopped {len(stopped)}: {', '.join(sorted(stopped))}")


def main() -> int:
    """Parse the command line, judge everything, print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="name what each misses or stops")
    options = parser.parse_args()
    make_deterministic()
    checkers = public_checkers()
    gate = Checker("**this gate**", "its own and images", run_gate, ONCE)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            case = real_case(folder)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        bad = bad_exports(case, folder)
        honest = honest_exports(itertools.chain([case], other_cases(case, folder)), folder)
        names = [{export.name for export in part} for part in (bad, honest)]
        print_heading(bad, honest)
        total = sum(len(checker.settings) for checker in (*checkers, gate))
        with tqdm(total=total * len([*bad, *honest]), unit="verdict", disable=None) as progress:
            for checker in (*checkers, gate):
                if checker is gate:
                    print_together(checkers, *names)
                progress.set_description(checker.name)
                checker.run([*bad, *honest], progress)
                print_row(checker, *names)
    if options.verbose:
        for checker in (*checkers, gate):
            print_misses(checker, *names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
