"""What the earlier stages left on disk: read, checked, and checked against each other."""

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from mnist_batchnorm.dataset import CLASSES, Split, load_split
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest
from mnist_batchnorm.layout import (
    CHECKPOINT,
    CHECKPOINT_KEY,
    CHECKPOINTS,
    GRAPHS,
    MODELS,
    PARITY,
    REPORTS,
    SEED_CURVES,
    SEEDS,
    TEST_SPLIT,
    VARIANTS,
)
from mnist_batchnorm.params import Params, load_params

CURVE_COLUMNS = ("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
SEED_CURVE_COLUMNS = ("variant", "seed", "epoch", "valid_loss", "valid_accuracy")
CONFUSION_COLUMNS = ("actual", *map(str, range(CLASSES)), "accuracy")
PREDICTION_COLUMNS = ("index", "actual", "predicted", "probability")

Floats = npt.NDArray[np.float64]


class Record(BaseModel):
    """What the report reads of a JSON file; it may hold more."""

    model_config = ConfigDict(frozen=True)


class TrainMetrics(Record):
    """``reports/metrics/train-*.json``."""

    device: str
    torch: str | None = None  # its version; commits from before 2026-11-25 do not say


class EvaluationMetrics(Record):
    """``reports/metrics/test-*.json``."""

    accuracy: float
    loss: float
    calibration_error: float
    errors: int


class DataMetrics(Record):
    """``reports/metrics/data.json``."""

    protocol: str
    images: dict[str, int]
    per_class: dict[str, dict[int, int]]
    train_pixel_mean: float
    train_pixel_std: float


class Moments(Record):
    """A figure over seeds: its mean, sample standard deviation, and value from each seed."""

    mean: FiniteFloat
    sd: FiniteFloat
    values: list[FiniteFloat]


class Difference(Moments):
    """A difference over seeds, and the 95 % interval of its mean."""

    interval_95: tuple[FiniteFloat, FiniteFloat]


class SeedMeasures(Record):
    """What one network came to on the test images."""

    test_accuracy: Moments
    test_loss: Moments


class SeedDifferences(Record):
    """Batch norm minus plain, seed by seed."""

    test_accuracy: Difference


class SeedMetrics(Record):
    """``reports/metrics/seeds.json``."""

    seeds: Annotated[int, Field(ge=2)]
    device: str
    bn: SeedMeasures
    plain: SeedMeasures
    bn_minus_plain: SeedDifferences

    @model_validator(mode="after")
    def _a_value_for_each_seed(self) -> Self:
        for moments in (
            *(getattr(self[v], name) for v in VARIANTS for name in SeedMeasures.model_fields),
            self.difference,
        ):
            if len(moments.values) != self.seeds:
                raise ValueError(f"{self.seeds} seeds and {len(moments.values)} values do not fit")
        return self

    def __getitem__(self, variant: str) -> SeedMeasures:
        """Return what one network came to."""
        return {"bn": self.bn, "plain": self.plain}[variant]

    @property
    def difference(self) -> Difference:
        """By how much batch norm is more accurate."""
        return self.bn_minus_plain.test_accuracy


class Check(Record):
    """One check of the parity gate."""

    name: str
    status: Literal["passed", "failed", "not judged"]
    detail: str


class Diagnosis(Record):
    """A mistake that would explain what the gate found."""

    text: str


class JudgedFile(Record):
    """A file that the gate read, with its hash at that time."""

    path: str
    sha256: str


class JudgedImages(JudgedFile):
    """The split that the gate took its images from, and how many they are."""

    images: int


class Accuracy(Record):
    """Share of right predictions of one file, and of the network that it should be."""

    onnxruntime: float | None
    pytorch: float | None
    float64: float | None


class Histogram(Record):
    """Images by their largest error, in standard deviations of its rounding error.

    Attributes:
        edges: of the bins, ascending; the last is the alarm.
        counts: images in each bin, and last those beyond the alarm.
    """

    edges: list[float]
    counts: list[int]

    @model_validator(mode="after")
    def _one_count_more_than_bins(self) -> Self:
        if not 2 <= len(self.edges) == len(self.counts):
            raise ValueError(f"{len(self.edges)} edges and {len(self.counts)} counts do not fit")
        return self


class ParitySummary(Record):
    """One ONNX file's errors on the images, as docs/parity.md says; None: not measured."""

    max_relative_error: float | None
    worst_sigmas: float | None
    alarm_sigmas: float | None
    tolerance: float | None
    certified: int | None
    argmax_differences: int | None
    undecided: int | None
    accuracy: Accuracy | None
    histogram: Histogram | None


class GraphParity(Record):
    """What the gate found about one ONNX file."""

    onnx: JudgedFile
    weights: JudgedFile
    verdict: Literal["parity", "no parity", "unproven"]
    parity: bool
    summary: ParitySummary
    diagnoses: list[Diagnosis]
    checks: list[Check]

    @property
    def proven(self) -> bool:
        """Whether neither the verdict nor any check speaks against parity."""
        passed = [check.status == "passed" for check in self.checks]
        return self.parity and self.verdict == "parity" and bool(passed) and all(passed)


class Goldens(Record):
    """Images, and what each ONNX file computed from them when it passed.

    Attributes:
        images: uint8 ``[n, 784]`` in Base64.
        labels: ``[n]``, the digits.
        logits: ``[n, 10]`` of each file.
    """

    images: Base64Bytes
    labels: list[int]
    logits: dict[str, list[list[float]]]


class Parity(Record):
    """``reports/parity.json``.

    Attributes:
        goldens: None in reports of version 0.1 and before.
    """

    version: Literal[1] = Field(alias="schema")
    parity: bool
    data: JudgedImages
    versions: dict[str, str]
    goldens: Goldens | None = None
    graphs: dict[str, GraphParity]

    @property
    def proven(self) -> bool:
        """Whether nothing in the file, on any level, speaks against parity."""
        return self.parity and self.proves(self.graphs)

    def proves(self, files: Iterable[str]) -> bool:
        """Whether nothing in the file speaks against these ONNX files.

        A verdict against the whole speaks against each, unless another file's explains it.
        """
        found = [self.graphs.get(file) for file in files]
        explained = self.parity or not all(graph.proven for graph in self.graphs.values())
        return (
            explained and bool(found) and all(graph is not None and graph.proven for graph in found)
        )


@dataclass(frozen=True)
class Network:
    """What the earlier stages found out about one network.

    Attributes:
        curve: float64 ``[epochs]`` for each column of the learning curve.
        training: where and by what it was trained.
        test: metrics on the test images.
        confusion: int64 ``[10, 10]``, rows actual, columns predicted.
        per_class_accuracy: of the classes that the test images hold.
        predicted: int64 ``[n]``, the class given to each test image.
        probability: float64 ``[n]``, of that class.
    """

    curve: dict[str, Floats]
    training: TrainMetrics
    test: EvaluationMetrics
    confusion: npt.NDArray[np.int64]
    per_class_accuracy: dict[int, float]
    predicted: npt.NDArray[np.int64]
    probability: Floats


@dataclass(frozen=True)
class SeedRuns:
    """What stage seeds found out about both networks, from seeds 0, 1, ...

    Attributes:
        metrics: after training.
        epoch: float64 ``[epochs]``.
        curves: for each network ``valid_loss`` and ``valid_accuracy``, float64 ``[seeds, epochs]``.
    """

    metrics: SeedMetrics
    epoch: Floats
    curves: dict[str, dict[str, Floats]]


@dataclass(frozen=True)
class LayerStatistics:
    """One batch-norm layer, a value for each of its units.

    Attributes:
        mean: running mean of what arrives.
        deviation: square root of the running variance.
        scale: learned gamma, the deviation of what leaves.
        shift: learned beta, the mean of what leaves.
    """

    mean: Floats
    deviation: Floats
    scale: Floats
    shift: Floats


@dataclass(frozen=True)
class ModelFile:
    """A file that ships: its name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Results:
    """Everything that the report is made from."""

    params: Params
    data: DataMetrics
    test: Split
    networks: dict[str, Network]
    seeds: SeedRuns
    layers: dict[str, LayerStatistics]
    parity: Parity
    files: list[ModelFile]

    @property
    def lecture(self) -> bool:
        """Whether training was watched on the test images, as the lecture does it."""
        return self.data.protocol.startswith("lecture")

    @property
    def split_labels(self) -> dict[str, str]:
        """What to call the two splits that the learning curves watch."""
        return {"train": "train", "valid": "valid (= test images)" if self.lecture else "valid"}


RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT], stage: str) -> RecordT:
    """Read the JSON file that a stage wrote.

    Raises:
        UserError: The file is missing or does not hold what that stage writes.
    """
    try:
        return kind.model_validate_json(_read(path, stage))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{path} is not what `dvc repro {stage}` writes: {where}: {first['msg']}"
        ) from None


def read_table(
    path: Path,
    columns: tuple[str, ...],
    stage: str,
    gaps: tuple[str, ...] = (),
    words: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Floats]:
    """Read the CSV of numbers that a stage wrote.

    Args:
        path: where.
        columns: its header.
        stage: who wrote it.
        gaps: columns that may have empty cells.
        words: columns of words, and which; each counts as its place among them.

    Returns:
        float64 ``[rows]``, at least one row, for each column; NaN for an empty cell.

    Raises:
        UserError: The file is missing, has other columns, no rows or something not a number.
    """
    header, _, body = _read(path, stage).partition("\n")
    try:
        if header.split(",") != list(columns):
            raise ValueError(f"its columns are {header!r}, not {','.join(columns)!r}")
        if not body.strip():
            raise ValueError("it has no rows")
        table = np.loadtxt(
            io.StringIO(body),
            delimiter=",",
            comments=None,
            ndmin=2,
            converters={
                **{columns.index(name): _number_or_nan for name in gaps},
                **{columns.index(name): _place_among(of) for name, of in words.items()},
            },
        )
        if (
            table.shape[1] != len(columns)
            or not (np.isfinite(table) | (np.isnan(table) & np.isin(columns, gaps))).all()
        ):
            raise ValueError(f"a row does not hold {len(columns)} finite numbers")
    except ValueError as error:
        raise UserError(f"{path} is not what `dvc repro {stage}` writes: {error}") from None
    return dict(zip(columns, table.T, strict=True))


def _number_or_nan(cell: str) -> float:
    return float(cell) if cell else math.nan


def _place_among(words: tuple[str, ...]) -> Callable[[str], float]:
    return lambda cell: float(words.index(cell))


def _read(path: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro {stage}` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_training(variant: str) -> tuple[TrainMetrics, dict[str, Floats]]:
    """Read what stage train wrote about one network: of its end, and the learning curve.

    Raises:
        UserError: A file is missing or malformed.
    """
    return (
        read_record(REPORTS / f"metrics/train-{variant}.json", TrainMetrics, "train"),
        read_table(REPORTS / f"curves/{variant}.csv", CURVE_COLUMNS, "train"),
    )


def read_network(variant: str, test: Split) -> Network:
    """Gather what train and evaluate wrote about one network.

    Raises:
        UserError: A file is missing or malformed, or is about other test images.
    """
    path = REPORTS / f"predictions/{variant}.csv"
    predictions = read_table(path, PREDICTION_COLUMNS, "evaluate")
    if not (
        np.array_equal(predictions["index"], test.index)
        and np.array_equal(predictions["actual"], test.labels)
    ):
        raise UserError(f"{path} is about other images than {TEST_SPLIT}; run `dvc repro evaluate`")
    confusion, per_class_accuracy = read_confusion(REPORTS / f"confusion/{variant}.csv")
    training, curve = read_training(variant)
    return Network(
        curve=curve,
        training=training,
        test=read_record(REPORTS / f"metrics/test-{variant}.json", EvaluationMetrics, "evaluate"),
        confusion=confusion,
        per_class_accuracy=per_class_accuracy,
        predicted=predictions["predicted"].astype(np.int64),
        probability=predictions["probability"],
    )


def read_confusion(path: Path) -> tuple[npt.NDArray[np.int64], dict[int, float]]:
    """Read a confusion matrix, int64 ``[10, 10]``, and the accuracy of each class with images.

    Raises:
        UserError: The file is missing or malformed.
    """
    table = read_table(path, CONFUSION_COLUMNS, "evaluate", gaps=("accuracy",))
    actual, *counts, accuracy = table.values()
    if not np.array_equal(actual, np.arange(CLASSES)):
        raise UserError(
            f"{path} is not what `dvc repro evaluate` writes: its rows are not the classes 0 to 9"
        )
    known = {digit: float(share) for digit, share in enumerate(accuracy) if not np.isnan(share)}
    return np.stack(counts, axis=1).astype(np.int64), known


def read_seeds() -> SeedRuns:
    """Gather what stage seeds wrote.

    Raises:
        UserError: A file is missing or malformed, or the two are about other runs.
    """
    metrics = read_record(SEEDS, SeedMetrics, "seeds")
    table = read_table(SEED_CURVES, SEED_CURVE_COLUMNS, "seeds", words={"variant": VARIANTS})
    runs, rows = len(VARIANTS) * metrics.seeds, len(table["epoch"])
    shape = (len(VARIANTS), metrics.seeds, rows // runs)
    variant, seed, epoch = (axis.ravel() for axis in np.indices(shape))
    for name, expected in {"variant": variant, "seed": seed, "epoch": epoch + 1}.items():
        if not np.array_equal(table[name], expected):
            raise UserError(
                f"{SEED_CURVES} is about other runs than {SEEDS}; run `dvc repro seeds`"
            )
    return SeedRuns(
        metrics=metrics,
        epoch=np.arange(1.0, shape[-1] + 1),
        curves={
            name: {
                measure: table[measure].reshape(shape)[index]
                for measure in ("valid_loss", "valid_accuracy")
            }
            for index, name in enumerate(VARIANTS)
        },
    )


def read_layers(path: Path) -> dict[str, LayerStatistics]:
    """Read each batch-norm layer's statistics and learned scale and shift from a checkpoint.

    Raises:
        UserError: The file is missing or unreadable, or a layer lacks one of the four.
    """
    suffix = ".running_mean"
    try:
        tensors = {name: t.astype(np.float64) for name, t in load_file(path).items()}
        return {
            (layer := name.removesuffix(suffix)): LayerStatistics(
                mean=mean,
                deviation=np.sqrt(tensors[f"{layer}.running_var"]),
                scale=tensors[f"{layer}.weight"],
                shift=tensors[f"{layer}.bias"],
            )
            for name, mean in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0]))
            if name.endswith(suffix)
        }
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro train` first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of this project: it lacks {error}") from None


def trained_on(checkpoint: Path) -> str:
    """Return the SHA-256 of the images that a checkpoint says it was trained on.

    Raises:
        UserError: The file is missing or is not a checkpoint of this project.
    """
    try:
        with safe_open(checkpoint, "np") as stored:
            metadata = json.loads((stored.metadata() or {})[CHECKPOINT_KEY])
        return str(metadata["provenance"]["train_sha256"])
    except FileNotFoundError:
        raise UserError(f"no {checkpoint}; run `dvc repro train` first") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint of this project: {type(error).__name__}: {error}"
        ) from None


def read_parity() -> Parity:
    """Read the gate's verdict and make sure that it is about the files as they are now.

    Raises:
        UserError: The verdict or a file that it is about is missing, the file has changed, or it
            is none of `GRAPHS`.
    """
    parity = read_record(PARITY, Parity, "verify")
    if unknown := sorted(parity.graphs.keys() - GRAPHS.keys()):
        raise UserError(
            f"{PARITY} is about {', '.join(unknown)}, which stage export does not write; "
            "run `dvc repro verify`"
        )
    judged: list[tuple[Path, str, JudgedFile]] = [(TEST_SPLIT, "prepare", parity.data)]
    for name, graph in parity.graphs.items():
        weights = CHECKPOINTS[GRAPHS[name].variant]
        judged += [(weights, "train", graph.weights), (MODELS / name, "export", graph.onnx)]
    for file, stage, then in judged:
        if not file.is_file():
            raise UserError(f"no {file}; run `dvc repro {stage}` first")
        if (actual := digest(file)) != then.sha256:
            raise UserError(
                f"{PARITY} is about a {file} with SHA-256 {then.sha256[:12]}…, but the file is "
                f"{actual[:12]}…; run `dvc repro verify`"
            )
    return parity


def read_results() -> Results:
    """Gather everything the report is made from, in the current folder.

    Raises:
        UserError: An input is missing, malformed, or does not fit the others.
    """
    params = load_params()
    test = load_split(TEST_SPLIT)
    parity = read_parity()
    # commits from before 2026-11-25 do not judge plain.onnx; sync reads those too
    if missing := [name for name in GRAPHS if name not in parity.graphs]:
        raise UserError(f"{PARITY} says nothing about {', '.join(missing)}; run `dvc repro verify`")
    files = [*CHECKPOINTS.values(), *(MODELS / name for name in parity.graphs)]
    return Results(
        params=params,
        data=read_record(REPORTS / "metrics/data.json", DataMetrics, "prepare"),
        test=test,
        networks={variant: read_network(variant, test) for variant in VARIANTS},
        seeds=read_seeds(),
        layers=read_layers(CHECKPOINT),
        parity=parity,
        files=[ModelFile(p.as_posix(), p.stat().st_size, digest(p)) for p in files],
    )
