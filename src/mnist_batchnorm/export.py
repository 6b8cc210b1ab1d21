"""Stage export: the trained batch-norm network to ONNX, in eval mode, with nothing but content.

Two graphs of the same network: ``bn.onnx`` keeps its BatchNormalization nodes, so that anyone can
read the frozen statistics in the file; ``bn-folded.onnx`` has them folded into the Gemm before.
"""

import hashlib
import json
import logging
from pathlib import Path

import click
import onnx
import torch
from torch import nn

from mnist_batchnorm.batchnorm import require_frozen
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest, write_bytes
from mnist_batchnorm.layout import CHECKPOINT, GRAPHS, MODELS
from mnist_batchnorm.model import Checkpoint, load_checkpoint

INPUT, OUTPUT = "image", "logits"


def export_onnx(model: nn.Sequential, opset: int, fold: bool) -> onnx.ModelProto:
    """Trace a network in eval mode into an ONNX graph with a symbolic batch axis.

    Args:
        model: the network, on the CPU, in eval mode; its first layer is a Linear.
        opset: version of the ONNX standard operators.
        fold: whether the exporter's optimizer folds each BatchNormalization into the Gemm before.

    Returns:
        One graph ``image`` float32 ``[batch, inputs]`` -> ``logits`` float32 ``[batch, outputs]``
        without the exporter's traces of this machine.

    Raises:
        CheckFailedError: The model is in train mode, or its statistics are missing, were never
            updated, or are impossible.
    """
    require_frozen(model)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it suggests installing torchvision
    first = model[0]
    assert isinstance(first, torch.nn.Linear)
    example = torch.zeros(2, first.in_features)  # 2: the exporter would take 1 for a constant
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        optimize=fold,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    strip_circumstance(proto)
    return proto


def strip_circumstance(proto: onnx.ModelProto) -> None:
    """Remove what depends on where the export ran: absolute paths, the build of PyTorch."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for part in (graph, proto):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.producer_version = proto.producer_version.partition("+")[0]  # 2.15.0+cu132


def provenance(weights: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Say which weights, data and params make an ONNX file, and how to feed it.

    Content only, so the same checkpoint says the same everywhere.
    """
    params = json.dumps(checkpoint.provenance["params"], sort_keys=True)
    content = {
        "weights_sha256": digest(weights),
        "train_data_sha256": checkpoint.provenance["train_sha256"],
        "train_params_sha256": hashlib.sha256(params.encode()).hexdigest(),
        "input": "float32 [batch, 784], pixel / 255, rows top to bottom",
        "output": "float32 [batch, 10], one logit a digit, no softmax",
    }
    return {f"mnist_batchnorm.{key}": value for key, value in sorted(content.items())}


def embed_provenance(proto: onnx.ModelProto, weights: Path, checkpoint: Checkpoint) -> None:
    """Write the `provenance` into the model's metadata, in place of what is there."""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, provenance(weights, checkpoint))


def export(weights: Path, opset: int) -> dict[str, bytes]:
    """Export a checkpoint to both graphs; the same checkpoint gives the same bytes.

    Returns:
        The bytes of each file of `GRAPHS`.

    Raises:
        UserError: The checkpoint cannot be read, or has no batch norm.
        CheckFailedError: Its statistics are missing, were never updated, or are impossible.
    """
    checkpoint = load_checkpoint(weights)
    if not checkpoint.architecture.batch_norm:
        raise UserError(f"{weights} holds the network without batch norm; export takes the other")
    model = checkpoint.model()
    files = {}
    for name, fold in GRAPHS.items():
        proto = export_onnx(model, opset, fold)
        embed_provenance(proto, weights, checkpoint)
        onnx.checker.check_model(proto, full_check=True)
        files[name] = proto.SerializeToString(deterministic=True)
    return files


@click.command()
def command() -> None:
    """Export the batch-norm network to ONNX in eval mode (models/bn.onnx, bn-folded.onnx)."""
    from mnist_batchnorm.params import load_params

    files = export(CHECKPOINT, load_params().export.opset)
    for name, content in files.items():
        write_bytes(MODELS / name, content)
        click.echo(f"{MODELS / name}: {len(content):,} bytes")
