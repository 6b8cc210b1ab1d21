"""A folder in which every stage before report has run, made with what those stages write."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from mnist_batchnorm.artifacts.curves import Epoch, write_curve
from mnist_batchnorm.artifacts.metrics import (
    TEST_METRICS,
    EvaluationMetrics,
    TrainMetrics,
    write_train_metrics,
)
from mnist_batchnorm.artifacts.parity_report import goldens_of
from mnist_batchnorm.artifacts.predictions import write_confusion, write_predictions
from mnist_batchnorm.artifacts.seeds import write_seeds as write_seed_runs
from mnist_batchnorm.artifacts.splits import CLASSES, SIDE, load_split
from mnist_batchnorm.core.files import digest, write_bytes, write_json, write_text
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, VARIANTS
from mnist_batchnorm.network.evaluation import evaluate
from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
from mnist_batchnorm.parity import Check, Diagnosis, ParityReport, runtime
from mnist_batchnorm.parity.report import CHECKS
from mnist_batchnorm.training.loop import architecture
from mnist_batchnorm.training.replicas import Replicas
from mnist_batchnorm.training.seeds import summarize

PASSED = [Check(name, "passed", f"{name}: nothing against it") for name in CHECKS]
MEASURED: dict[str, Any] = {
    "max_relative_error": 7.5e-7,
    "worst_sigmas": 3.04,
    "alarm_sigmas": 8,
    "tolerance": 1.9e-6,
    "certified": 499,
    "argmax_differences": 0,
    "undecided": 1,
    "accuracy": {"onnxruntime": 0.84, "pytorch": 0.84, "float64": 0.84},
    "histogram": {
        "edges": (np.arange(17) / 2).tolist(),
        "counts": [21, 272, 171, 31, 4, 0, 1, *[0] * 10],
    },
}


def finish(project: Path, prepared: Path, params: Params) -> None:
    """Fill ``project`` with the results of two networks whose logits are the labels and noise."""
    copytree(prepared, project / "data/prepared")
    reports = project / "reports"
    write_text(reports / "metrics/data.json", (prepared / "data.json").read_text())
    test = load_split(prepared / "test.safetensors")
    for seed, variant in enumerate(VARIANTS):
        save_checkpoint(project / f"models/{variant}.safetensors", checkpoint(variant, params))
        noise = np.random.default_rng(seed).normal(scale=2 + seed, size=(len(test), CLASSES))
        logits = (5 * np.eye(CLASSES)[test.labels] + noise).astype(np.float32)
        result = evaluate(logits, test.labels, params.evaluate.calibration_bins)
        metrics = EvaluationMetrics.model_validate(result, from_attributes=True)
        loss = 0.1 * (1 + seed)
        curve = [Epoch(i, loss / i, 1 - loss / i, loss, 1 - loss) for i in (1, 2, 3)]
        with contextlib.chdir(project):
            metrics.write(TEST_METRICS[variant])
            write_confusion(variant, result.confusion)
            write_predictions(variant, test, result.predicted, result.probability)
            write_curve(variant, curve)
            trained = TrainMetrics(device="cpu", torch="2.15.0")
            write_train_metrics(variant, trained, curve[-1])
    write_seeds(project)
    for name in GRAPHS:
        write_bytes(project / "models" / name, tiny_graph())
    write_parity(project, PASSED)


PICTURES = (
    *("curves", "confusion-bn", "confusion-plain", "seeds"),
    *(f"parity-{Path(name).stem}" for name in GRAPHS),
)


def write_pages(project: Path) -> None:
    """Write what stage report does, in a few words."""
    for name in PICTURES:
        write_text(project / f"reports/plots/{name}.svg", f"<svg><!-- {name} --></svg>")
    write_text(project / "reports/index.html", "<!doctype html>")
    write_text(project / "reports/model_card.md", "# Model card\n")


def write_seeds(project: Path, count: int = 2, epochs: int = 3, gain: float = 0.015) -> None:
    """Write what stage seeds does: each seed ends 0.001 above the one before."""
    seeds = range(count)
    results = {}
    for variant in VARIANTS:
        end = 0.95 + 0.001 * np.array(seeds) + (gain if variant == "bn" else 0)
        rows = [
            {"epoch": epoch, "valid_loss": (2 - end) / epoch, "valid_accuracy": end - 0.01 / epoch}
            for epoch in range(1, epochs + 1)
        ]
        # in pairs not all alike: every other plain network is a little better
        end = end + 0.0002 * (np.array(seeds) % 2) * (variant == "plain")
        results[variant] = Replicas(rows, (1 - end).tolist(), end.tolist(), Path(), "cpu")
    with contextlib.chdir(project):
        write_seed_runs(summarize(results))


def checkpoint(variant: str, params: Params) -> Checkpoint:
    """An untrained network; with batch norm, its statistics have seen one batch of noise."""
    network = architecture(variant, params.train)
    model = network.build(params.train.seed).train()
    with torch.no_grad():
        model(torch.rand(32, SIDE * SIDE, generator=torch.Generator().manual_seed(0)))
    provenance = {"variant": variant, "device": "cpu", "train_sha256": "1" * 64}
    return Checkpoint(network, model.state_dict(), provenance)


def tiny_graph() -> bytes:
    """An ONNX file with the pipeline's input and output; what it computes does not matter here."""
    weight = np.eye(SIDE * SIDE, CLASSES, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["image", "weight"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 784])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    opset = helper.make_opsetid("", 20)
    content: bytes = helper.make_model(
        graph, opset_imports=[opset], ir_version=10
    ).SerializeToString()
    return content


def write_parity(
    project: Path,
    checks: list[Check],
    diagnoses: Sequence[Diagnosis] = (),
    summary: dict[str, Any] = MEASURED,
    about: str = "bn.onnx",
) -> None:
    """Write ``reports/parity.json``: this about one file, and nothing against the others.

    ``summary`` holds what was measured; the rest the report says itself.
    """
    models, test = Path("models"), Path("data/prepared/test.safetensors")
    found = {check.name: check for check in checks}
    checks = [found.get(check.name, check) for check in PASSED]

    def report(
        name: str, checks: list[Check], diagnoses: Sequence[Diagnosis], summary: dict[str, Any]
    ) -> dict[str, Any]:
        onnx, weights = models / name, CHECKPOINTS[GRAPHS[name].variant]
        judged = ParityReport(
            onnx=onnx.as_posix(),
            onnx_sha256=digest(project / onnx),
            weights=weights.as_posix(),
            weights_sha256=digest(project / weights),
            checks=checks,
            diagnoses=list(diagnoses),
        )
        return judged.to_json() | {"summary": asdict(judged.summary()) | summary}

    split = load_split(project / test)
    graphs = {name: report(name, PASSED, [], MEASURED) for name in GRAPHS}
    graphs[about] = report(about, checks, diagnoses, summary)
    content = {
        "schema": 1,
        "parity": all(graph["parity"] for graph in graphs.values()),
        "data": {
            "path": test.as_posix(),
            "sha256": digest(project / test),
            "images": len(split),
        },
        "versions": {"onnxruntime": "1.32.0", "onnx": "1.23.2", "torch": "2.15.0"},
        "goldens": goldens_of(
            split,
            {name: runtime.load((project / models / name).read_bytes()).run for name in graphs},
        ),
        "graphs": graphs,
    }
    write_json(project / "reports/parity.json", content)
