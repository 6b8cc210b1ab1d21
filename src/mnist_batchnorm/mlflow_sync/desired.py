"""What MLflow should contain, read from the results in the current folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mnist_batchnorm.artifacts.curves import read_curve
from mnist_batchnorm.artifacts.metrics import read_train_metrics
from mnist_batchnorm.artifacts.network_results import NetworkResults, read_network
from mnist_batchnorm.artifacts.parity_report import Parity, read_parity
from mnist_batchnorm.artifacts.seeds import SeedRuns, read_seeds
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.arrays import Float64
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
from mnist_batchnorm.mlflow_sync.points import Point, curve_points, now
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity, SeedsIdentity

SEEDS_PICTURE = REPORTS / "plots/seeds.svg"


@dataclass(frozen=True)
class DesiredRun:
    """The desired content of one network's run."""

    identity: RunIdentity
    curve: list[Point]
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    reports: Sequence[Path] = ()
    models: Sequence[Path] = ()


@dataclass(frozen=True)
class DesiredSeeds:
    """The desired content of the runs of stage seeds."""

    identity: SeedsIdentity
    summary: list[Point]
    runs: Mapping[tuple[str, int], list[Point]]
    reports: list[Path]


def read_trainings() -> list[DesiredRun]:
    return [
        DesiredRun(
            RunIdentity.of_files(variant, read_train_metrics(variant)),
            _points(read_curve(variant)),
        )
        for variant in VARIANTS
    ]


def read_all() -> tuple[list[DesiredRun], DesiredSeeds]:
    """Read the outputs of all stages.

    Raises:
        UserError: A file is missing or malformed, or about other files than these.
    """
    test, parity = load_split(TEST_SPLIT), read_parity()
    networks = {variant: read_network(variant, test) for variant in VARIANTS}
    runs = [_desired_run(*entry, parity) for entry in networks.items()]
    return runs, _desired_seeds(read_seeds())


def _desired_run(variant: str, network: NetworkResults, parity: Parity) -> DesiredRun:
    # commits before 2026-11-25 did not export plain
    graphs = {
        name: graph for name, graph in parity.graphs.items() if GRAPHS[name].variant == variant
    }
    metrics = {
        "test/accuracy": network.test.accuracy,
        "test/loss": network.test.loss,
        "test/calibration_error": network.test.calibration_error,
    }
    for digit, accuracy in network.per_class_accuracy.items():
        metrics[f"test_class_accuracy/{digit}"] = accuracy
    for name, graph in graphs.items():
        for measure in ("max_relative_error", "worst_sigmas"):
            if (value := getattr(graph.summary, measure)) is not None:
                metrics[f"parity_{measure}/{name}"] = value
    plots = REPORTS / "plots"
    other_variants = [f"-{other}" for other in VARIANTS if other != variant]
    reports = [
        *(
            picture
            for picture in sorted(plots.glob("*.svg")) or [plots]
            if picture != SEEDS_PICTURE and not any(o in picture.stem for o in other_variants)
        ),
        REPORTS / f"confusion/{variant}.csv",
        REPORTS / "index.html",
        REPORTS / "model_card.md",
        PARITY,
    ]
    _require(*reports)
    return DesiredRun(
        RunIdentity.of_files(variant, network.training),
        _points(network.curve),
        metrics,
        {"parity": "passed" if parity.proves(graphs) else "failed"} if graphs else {},
        reports,
        [MODELS / name for name in graphs],
    )


def _require(*reports: Path) -> None:
    for path in reports:
        if not path.is_file():
            raise UserError(f"no {path}; run `dvc repro report` first")


def _desired_seeds(seeds: SeedRuns) -> DesiredSeeds:
    # names differ from those of the training runs, whose charts would show these runs too
    metrics, time = seeds.metrics, now()
    summary = {
        f"seeds/{variant}_{measure}_{figure}": getattr(getattr(metrics[variant], measure), figure)
        for variant in VARIANTS
        for measure in ("test_accuracy", "test_loss")
        for figure in ("mean", "sd")
    }
    difference = metrics.difference
    low, high = difference.interval_95
    figures = {"mean": difference.mean, "sd": difference.sd, "low": low, "high": high}
    for figure, value in figures.items():
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
    _require(SEEDS_PICTURE)
    return DesiredSeeds(
        SeedsIdentity.of_summary(metrics.device, metrics.seeds),
        [Point(name, 0, value, time) for name, value in summary.items()],
        runs,
        [SEEDS_PICTURE, SEEDS, SEED_CURVES],
    )


def _points(columns: Mapping[str, Float64]) -> list[Point]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [point for row in rows for point in curve_points(dict(zip(columns, row, strict=True)))]
