"""What MLflow shall hold about the results on disk, which can be made from them at any time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mnist_batchnorm.artifacts.network_results import Network, read_network, read_training
from mnist_batchnorm.artifacts.parity_report import Parity, ParitySummary, read_parity
from mnist_batchnorm.artifacts.reading import Floats
from mnist_batchnorm.artifacts.seeds import SeedRuns, read_seeds
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import (
    GRAPHS,
    MODELS,
    PARITY,
    REPORTS,
    SEED_CURVES,
    SEEDS,
    TEST_SPLIT,
    VARIANTS,
)
from mnist_batchnorm.mlflow_sync.run_identity import Origin, SeedsOrigin
from mnist_batchnorm.mlflow_sync.run_store import Point, curve_points, now

SEEDS_PICTURE = REPORTS / "plots/seeds.svg"


@dataclass(frozen=True)
class Outcome:
    """What MLflow shall know about one network once the pipeline has run.

    Attributes:
        origin: what made its training run.
        curve: the learning curve.
        metrics: measured after training, by MLflow's name.
        tags: further tags.
        reports: pictures, tables and pages about it, in ``reports/``.
        models: ONNX files made of it.
    """

    origin: Origin
    curve: list[Point]
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    reports: Sequence[Path] = ()
    models: Sequence[Path] = ()


@dataclass(frozen=True)
class SeedsOutcome:
    """What MLflow shall know about the runs of stage seeds.

    Attributes:
        origin: what made them.
        summary: the figures over all seeds.
        runs: curve and figures of each network and seed.
        reports: files about them, in ``reports/``.
    """

    origin: SeedsOrigin
    summary: list[Point]
    runs: Mapping[tuple[str, int], list[Point]]
    reports: list[Path]


def read_trainings() -> list[Outcome]:
    """Read what stage train left in the current folder, whatever became of it since.

    Raises:
        UserError: A file is missing or malformed.
    """
    return [
        Outcome(Origin.of_files(variant, metrics), curve_of(curve))
        for variant in VARIANTS
        for metrics, curve in [read_training(variant)]
    ]


def read_outcomes() -> tuple[list[Outcome], SeedsOutcome]:
    """Read what all stages left in the current folder.

    Raises:
        UserError: A file is missing or malformed, or is about other files than these.
    """
    test, parity = load_split(TEST_SPLIT), read_parity()
    networks = {variant: read_network(variant, test) for variant in VARIANTS}
    outcomes = [gather(variant, network, parity) for variant, network in networks.items()]
    return outcomes, gather_seeds(read_seeds())


def gather(variant: str, network: Network, parity: Parity) -> Outcome:
    """Select what concerns one network.

    Raises:
        UserError: A report is missing.
    """
    # none of plain, of commits from before 2026-11-25
    graphs = {name: one for name, one in parity.graphs.items() if GRAPHS[name].variant == variant}
    metrics = measurements(network)
    for name, graph in graphs.items():
        metrics |= parity_measurements(name, graph.summary)
    pictures = sorted((REPORTS / "plots").glob("*.svg"))
    others = [f"-{other}" for other in VARIANTS if other != variant]
    reports = [
        *(p for p in pictures if p != SEEDS_PICTURE and not any(o in p.stem for o in others)),
        REPORTS / f"confusion/{variant}.csv",
        REPORTS / "index.html",
        REPORTS / "model_card.md",
        PARITY,
    ]
    require(reports if pictures else [REPORTS / "plots"])
    return Outcome(
        Origin.of_files(variant, network.training),
        curve_of(network.curve),
        metrics,
        {"parity": "passed" if parity.proves(graphs) else "failed"} if graphs else {},
        reports,
        [MODELS / name for name in graphs],
    )


def require(reports: list[Path]) -> None:
    """Make sure that stage report has written these.

    Raises:
        UserError: One is missing.
    """
    for path in reports:
        if not path.is_file():
            raise UserError(f"no {path}; run `dvc repro report` first")


def gather_seeds(seeds: SeedRuns) -> SeedsOutcome:
    """Select what concerns the runs of stage seeds.

    Their metrics have names of their own, so that the charts of the training runs stay theirs.

    Raises:
        UserError: The picture is missing.
    """
    metrics, time = seeds.metrics, now()
    summary = {
        f"seeds/{variant}_{measure}_{figure}": getattr(getattr(metrics[variant], measure), figure)
        for variant in VARIANTS
        for measure in ("test_accuracy", "test_loss")
        for figure in ("mean", "sd")
    }
    difference = metrics.difference
    low, high = difference.interval_95
    for figure, value in {
        "mean": difference.mean, "sd": difference.sd, "low": low, "high": high
    }.items():  # fmt: skip
        summary[f"seeds/bn_minus_plain_test_accuracy_{figure}"] = value
    runs = {
        (variant, seed): [
            *(
                Point(f"seed_curves/{measure}", int(epoch), value, time)
                for measure, values in seeds.curves[variant].items()
                for epoch, value in zip(seeds.epoch, values[seed].tolist(), strict=True)
            ),
            Point("seed_test/accuracy", 0, metrics[variant].test_accuracy.values[seed], time),
            Point("seed_test/loss", 0, metrics[variant].test_loss.values[seed], time),
        ]
        for variant in VARIANTS
        for seed in range(metrics.seeds)
    }
    require([SEEDS_PICTURE])
    return SeedsOutcome(
        SeedsOrigin.of_summary(metrics.device, metrics.seeds),
        [Point(name, 0, value, time) for name, value in summary.items()],
        runs,
        [SEEDS_PICTURE, SEEDS, SEED_CURVES],
    )


def measurements(network: Network) -> dict[str, float]:
    """Name the measurements on the test images as MLflow shows them."""
    return {
        "test/accuracy": network.test.accuracy,
        "test/loss": network.test.loss,
        "test/calibration_error": network.test.calibration_error,
        **{
            f"test_class_accuracy/{digit}": accuracy
            for digit, accuracy in network.per_class_accuracy.items()
        },
    }


def parity_measurements(name: str, summary: ParitySummary) -> dict[str, float]:
    """Name what the gate measured of an ONNX file as MLflow shows it."""
    measured = {
        f"parity_max_relative_error/{name}": summary.max_relative_error,
        f"parity_worst_sigmas/{name}": summary.worst_sigmas,
    }
    return {key: value for key, value in measured.items() if value is not None}


def curve_of(columns: Mapping[str, Floats]) -> list[Point]:
    """Turn the columns of a learning curve into points."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [point for row in rows for point in curve_points(dict(zip(columns, row, strict=True)))]
