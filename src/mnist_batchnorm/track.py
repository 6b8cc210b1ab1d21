"""Stage track: complete the MLflow runs from the files on disk, and leave alone what is there."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click
import numpy as np
from tenacity import retry, stop_after_attempt, wait_fixed

from mnist_batchnorm.dataset import CLASSES, SIDE, network_input
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest, write_json
from mnist_batchnorm.layout import (
    MODELS,
    REPORTS,
    SEED_CURVES,
    SEEDS,
    VARIANTS,
    repository,
)
from mnist_batchnorm.params import load_params
from mnist_batchnorm.results import Network, ParitySummary, Results, SeedRuns, read_results
from mnist_batchnorm.runs import (
    Origin,
    Point,
    Runs,
    SeedsOrigin,
    curve_points,
    fingerprint,
    hashes,
    now,
    warn,
    without_password,
)

if TYPE_CHECKING:
    import numpy.typing as npt

EXAMPLES = 3  # test images in the model's input example
RECORD = REPORTS / "tracked.json"
REPORTS_TAG = "mnist_bn.reports"
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
        example: test images as the models take them, float32 ``[3, 784]``.
    """

    origin: Origin
    curve: list[Point]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    reports: list[Path]
    models: list[Path]
    example: "npt.NDArray[np.float32]"


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


def gather(results: Results, variant: str) -> Outcome:
    """Select what concerns one network; parity and the ONNX models concern batch norm only.

    Raises:
        UserError: A report is missing.
    """
    network = results.networks[variant]
    metrics = measurements(network)
    tags = {}
    models = []
    pictures = sorted((REPORTS / "plots").glob("*.svg"))
    others = [f"-{other}" for other in VARIANTS if other != variant]
    reports = [
        *(p for p in pictures if p != SEEDS_PICTURE and not any(o in p.stem for o in others)),
        REPORTS / f"confusion/{variant}.csv",
        REPORTS / "index.html",
        REPORTS / "model_card.md",
    ]
    if variant == "bn":
        graphs = results.parity.graphs
        for name, graph in graphs.items():
            metrics |= parity_measurements(name, graph.summary)
        tags["parity"] = "passed" if results.parity.proven else "failed"
        models = [MODELS / name for name in graphs]
        reports.append(REPORTS / "parity.json")
    require(reports if pictures else [REPORTS / "plots"])
    return Outcome(
        Origin.of_curve(variant, network.device),
        network_curve(network),
        metrics,
        tags,
        reports,
        models,
        network_input(results.test.images[:EXAMPLES]),
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
        SeedsOrigin.of_files(metrics.device, metrics.seeds),
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


def network_curve(network: Network) -> list[Point]:
    """Turn the columns of a learning curve into points."""
    rows = zip(*(column.tolist() for column in network.curve.values()), strict=True)
    return [
        point for row in rows for point in curve_points(dict(zip(network.curve, row, strict=True)))
    ]


def track(runs: Runs, outcome: Outcome) -> str:
    """Bring one run to the state of the files; doing it twice changes nothing.

    Returns:
        The run's id.
    """
    from mlflow.entities import Metric, RunTag

    with runs.lock:
        run_id = runs.record(outcome.origin, outcome.curve, "FINISHED")
        data = runs.client.get_run(run_id).data
        metrics = [
            Metric(name, value, now(), step=0)
            for name, value in outcome.metrics.items()
            if data.metrics.get(name) != value
        ]
        tags = [RunTag(*tag) for tag in outcome.tags.items() - data.tags.items()]
        if metrics or tags:
            runs.client.log_batch(run_id, metrics, tags=tags)
        log_reports(runs, run_id, outcome.reports, data.tags.get(REPORTS_TAG))
        for path in outcome.models:
            log_onnx(runs, run_id, path, outcome.example)
    return run_id


def track_seeds(runs: Runs, outcome: SeedsOutcome) -> str:
    """Bring the runs of stage seeds to the state of the files; twice is once.

    Returns:
        The id of the run over all.
    """
    with runs.lock:
        run_id = runs.record_seeds(outcome.origin, outcome.summary, outcome.runs)
        logged = runs.client.get_run(run_id).data.tags.get(REPORTS_TAG)
        log_reports(runs, run_id, outcome.reports, logged)
    return run_id


def log_reports(runs: Runs, run_id: str, reports: list[Path], logged: str | None) -> None:
    """Log files under their paths in ``reports/``, unless ``logged`` says they are there."""
    state = fingerprint(hashes(reports))
    if state == logged:
        return
    for path in reports:
        folder = path.parent.relative_to(REPORTS).as_posix()
        runs.client.log_artifact(run_id, str(path), None if folder == "." else folder)
    runs.client.set_tag(run_id, REPORTS_TAG, state)


def log_onnx(runs: Runs, run_id: str, path: Path, example: "npt.NDArray[np.float32]") -> None:
    """Log an ONNX file, byte for byte, as an MLflow model, unless the run has it.

    Args:
        runs: where.
        run_id: the run that it belongs to.
        path: ``models/bn.onnx`` becomes the model ``bn``.
        example: float32 ``[n, 784]``, shown as the model's input example.
    """
    sha256 = digest(path)
    for model in runs.client.search_logged_models(
        [runs.experiment_id], f"source_run_id = '{run_id}' AND tags.sha256 = '{sha256}'"
    ):
        if model.name == path.stem:
            if model.status == "READY":
                return
            runs.client.delete_logged_model(model.model_id)  # an upload that was cut short

    import mlflow
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(runs.uri)
    graph = onnx.load(path)
    (image,), (logits,) = graph.graph.input, graph.graph.output
    float32 = np.dtype(np.float32)
    (opset,) = (entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    model = mlflow.initialize_logged_model(
        path.stem,
        source_run_id=run_id,
        tags={"sha256": sha256, "mlflow.source.name": "mnist-bn track"},
        params=runs.client.get_run(run_id).data.params | {"export.opset": str(opset)},
        experiment_id=runs.experiment_id,
    )
    mlflow.onnx.log_model(
        graph,
        name=path.stem,
        model_id=model.model_id,
        run_id=run_id,
        signature=ModelSignature(
            inputs=Schema([TensorSpec(float32, (-1, SIDE * SIDE), image.name)]),
            outputs=Schema([TensorSpec(float32, (-1, CLASSES), logits.name)]),
        ),
        input_example={image.name: example},
        onnx_execution_providers=["CPUExecutionProvider"],
        # named, for MLflow would load the model and guess
        pip_requirements=[
            f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")
        ],
        save_as_external_data=False,
    )


# what is done is not done again, so once more is all that a server's hiccup needs
@retry(stop=stop_after_attempt(2), wait=wait_fixed(0.5), reraise=True)
def complete(
    experiment: str, root: Path, outcomes: list[Outcome], seeds: SeedsOutcome
) -> list[str]:
    """Track every outcome and say where it is.

    Raises:
        Exception: whatever MLflow or a plug-in of its raises for a store that is not usable.
    """
    runs = Runs.open(experiment, root)
    ids = {outcome.origin.variant: track(runs, outcome) for outcome in outcomes}
    ids["seeds"] = track_seeds(runs, seeds)
    return [
        *(f"{name}: MLflow run {run_id}" for name, run_id in ids.items()),
        f"compare them: {charts(runs)}",
    ]


def charts(runs: Runs) -> str:
    """Say where the UI shows the learning curves of all training runs in one chart each."""
    # MLflow's front page is about language models
    page = f"#/experiments/{runs.experiment_id}/runs?workflowType=machine_learning"
    trainings = quote("tags.dvc.stage = 'train'")  # else the newest runs only: those of stage seeds
    server = runs.uri.startswith(("http:", "https:"))
    local = "make ui (port 5000 unless PORT= says otherwise), http://127.0.0.1:5000"
    start = without_password(runs.uri.rstrip("/")) if server else local
    return f"{start}/{page}&compareRunsMode=CHART&searchFilter={trainings}"


def record(outcome: Outcome) -> dict[str, str]:
    """Say what MLflow shall hold about a network: the same content gives the same record."""
    results = {
        "metrics": dict(outcome.metrics),
        "tags": dict(outcome.tags),
        "files": hashes([*outcome.reports, *outcome.models]),
    }
    return {"key": outcome.origin.key, "results": fingerprint(results)}


def record_seeds(outcome: SeedsOutcome) -> dict[str, str]:
    """Say what MLflow shall hold about the runs of stage seeds."""
    return {"key": outcome.origin.key, "results": fingerprint(hashes(outcome.reports))}


@click.command()
def command() -> None:
    """Complete the MLflow runs from the files on disk.

    A store that cannot be reached is worth a warning, not a failed pipeline: nothing is lost, the
    same command completes the runs later. ``reports/tracked.json``, the stage's output for DVC,
    is about what was to be tracked, so it is the same either way.
    """
    experiment = load_params().track.experiment
    results = read_results()
    outcomes = [gather(results, variant) for variant in VARIANTS]
    seeds = gather_seeds(results.seeds)
    root = repository()
    try:
        for line in complete(experiment, root, outcomes, seeds):
            click.echo(line)
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        warn(error, root)
        click.echo("MLflow does not have all of the runs; `mnist-bn track` tries again", err=True)
    records = {outcome.origin.variant: record(outcome) for outcome in outcomes}
    write_json(RECORD, records | {"seeds": record_seeds(seeds)})
