"""A small trained network, what it computes, and the ways people break its export."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mnist_batchnorm.batchnorm import batch_norm_layers
from mnist_batchnorm.dataset import network_input
from mnist_batchnorm.export import embed_provenance, strip_circumstance
from mnist_batchnorm.model import Architecture, Checkpoint, save_checkpoint
from mnist_batchnorm.parity import GraphReport, Reference, check_graph

IMAGES = 256
BATCH_SIZES = (1, 7, IMAGES)
LIMIT = 5e-6

Judge = Callable[..., GraphReport]  # of a graph or a file's bytes, folded=False


def random_images(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """A batch-norm network whose statistics have moved; what it learnt does not matter here."""
    architecture = Architecture((784, 16, 16, 10), batch_norm=True)
    model = architecture.build(seed=1).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in batch_norm_layers(model).values():
            layer.weight.uniform_(0.5, 1.5, generator=generator)
            layer.bias.uniform_(-0.5, 0.5, generator=generator)
        for i in range(8):
            model(torch.from_numpy(network_input(random_images(i, 32))) * (i + 1))
    provenance = {"variant": "bn", "train_sha256": "0" * 64, "params": {}, "device": "cpu"}
    return Checkpoint(architecture, model.state_dict(), provenance)


@pytest.fixture(scope="session")
def weights(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "bn.safetensors"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> Reference:
    labels = np.zeros(IMAGES, dtype=np.uint8)
    return Reference.compute(checkpoint.model(), network_input(random_images(99, IMAGES)), labels)


@pytest.fixture
def judge(tmp_path: Path, checkpoint: Checkpoint, weights: Path, reference: Reference) -> Judge:
    """Run the gate on a graph that claims, truly or not, to come from the checkpoint."""

    def run(graph: onnx.ModelProto | bytes, folded: bool = False) -> GraphReport:
        if isinstance(graph, onnx.ModelProto):
            strip_circumstance(graph)
            embed_provenance(graph, weights, checkpoint)
            graph = graph.SerializeToString()
        path = tmp_path / "candidate.onnx"
        path.write_bytes(graph)
        return check_graph(path, weights, checkpoint, reference, BATCH_SIZES, LIMIT, folded=folded)

    return run


def torch_export(model: nn.Module, batch: int | None = None) -> onnx.ModelProto:
    """What torch.onnx.export makes of a module, asked directly; ``batch`` freezes the axis."""
    program = torch.onnx.export(
        model,
        (torch.zeros(batch or 2, 784),),
        dynamo=True,
        optimize=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def legacy_export(model: nn.Module, mode: torch.onnx.TrainingMode, folder: Path) -> onnx.ModelProto:
    """What the TorchScript exporter makes of a module; most exports in production are its."""
    path = folder / "legacy.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # all of that exporter is deprecated
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "ONNX Preprocess", UserWarning)
        torch.onnx.export(
            model,
            (torch.zeros(2, 784),),
            path,
            dynamo=False,
            training=mode,
            do_constant_folding=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    return onnx.load(path)
