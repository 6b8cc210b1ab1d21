"""A folder in which every stage before report has run, made with what those stages write."""

from dataclasses import asdict
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from mnist_batchnorm.dataset import CLASSES, SIDE, load_split
from mnist_batchnorm.evaluate import evaluate
from mnist_batchnorm.files import digest, write_bytes, write_json, write_text
from mnist_batchnorm.layout import VARIANTS
from mnist_batchnorm.model import Checkpoint, save_checkpoint
from mnist_batchnorm.params import Params
from mnist_batchnorm.parity import Check, GraphReport
from mnist_batchnorm.train import Epoch, architecture, write_curve

PASSED = [
    Check("structure", True, "the graph is the network's, operator for operator"),
    Check(
        "outputs",
        True,
        "500 images, 24 passes: largest error 7.5e-07 of the row's largest logit",
        {"max_relative_error": 7.5e-7, "limit": 5e-6, "argmax_differences": 0, "accuracy": 0.84},
    ),
]


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
        metrics, confusion, predictions = evaluate(logits, test, params.evaluate.calibration_bins)
        write_json(reports / f"metrics/test-{variant}.json", metrics)
        write_text(reports / f"confusion/{variant}.csv", confusion)
        write_text(reports / f"predictions/{variant}.csv", predictions)
        loss = 0.1 * (1 + seed)
        curve = [Epoch(i, loss / i, 1 - loss / i, loss, 1 - loss) for i in (1, 2, 3)]
        write_curve(reports / f"curves/{variant}.csv", curve)
        write_json(
            reports / f"metrics/train-{variant}.json", {"device": "cpu", **asdict(curve[-1])}
        )
    for name in ("bn.onnx", "bn-folded.onnx"):
        write_bytes(project / "models" / name, tiny_graph())
    write_parity(project, PASSED)


def checkpoint(variant: str, params: Params) -> Checkpoint:
    """An untrained network; with batch norm, its statistics have seen one batch of noise."""
    network = architecture(variant, params.train)
    model = network.build(params.train.seed).train()
    with torch.no_grad():
        model(torch.rand(32, SIDE * SIDE, generator=torch.Generator().manual_seed(0)))
    return Checkpoint(network, model.state_dict(), {"variant": variant, "device": "cpu"})


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


def write_parity(project: Path, checks: list[Check]) -> None:
    """Write ``reports/parity.json``: these checks about bn.onnx, and none failed of the other."""
    models, test = project / "models", project / "data/prepared/test.safetensors"
    graphs = {
        "bn.onnx": GraphReport(digest(models / "bn.onnx"), checks),
        "bn-folded.onnx": GraphReport(digest(models / "bn-folded.onnx"), PASSED),
    }
    content = {
        "parity": all(graph.parity for graph in graphs.values()),
        "checkpoint": {
            "path": "models/bn.safetensors",
            "sha256": digest(models / "bn.safetensors"),
        },
        "data": {
            "path": "data/prepared/test.safetensors",
            "sha256": digest(test),
            "images": len(load_split(test)),
        },
        "versions": {"onnxruntime": "1.32.0", "torch": "2.15.0"},
        "accuracy": {
            "pytorch": 0.84,
            "float64": 0.84,
            **{name: graph.outputs.get("accuracy") for name, graph in graphs.items()},
        },
        "graphs": {name: graph.to_json() for name, graph in graphs.items()},
    }
    write_json(project / "reports/parity.json", content)
