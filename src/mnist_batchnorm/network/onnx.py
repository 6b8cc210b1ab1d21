"""TODO."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.network.frozen import require_frozen
from mnist_batchnorm.network.model import Checkpoint

INPUT, OUTPUT = "image", "logits"


def trace(
    model: nn.Sequential, input_shape: Sequence[int], opset: int | None = None
) -> dict[bool, onnx.ModelProto]:
    """Trace a network in eval mode into ONNX graphs with a symbolic batch axis.

    Args:
        model: the network, on the CPU, in eval mode.
        input_shape: of one input, without the batch axis.
        opset: version of the ONNX standard operators; None for the exporter's default.

    Returns:
        By whether the exporter's optimizer has folded batch norm into the layer before: one graph
        ``image`` float32 ``[batch, ...]`` -> ``logits`` float32 ``[batch, ...]``, without the
        exporter's traces of this machine.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it suggests installing torchvision
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *input_shape),),  # 2: the exporter would take 1 for a constant
        dynamo=True,
        optimize=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    kept = program.model_proto
    program.optimize()
    graphs = {False: kept, True: program.model_proto}
    for proto in graphs.values():
        strip_circumstance(proto)
    return graphs


def export_onnx(
    model: nn.Sequential, input_shape: Sequence[int], opset: int
) -> dict[bool, onnx.ModelProto]:
    """Export a network that is fit to ship; see `trace`.

    Raises:
        CheckFailedError: The model is in train mode, or its statistics are missing, were never
            updated, or are impossible.
    """
    require_frozen(model)
    return trace(model, input_shape, opset)


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

    Content only, so the same checkpoint says the same everywhere; nothing of what the checkpoint
    itself does not say.
    """
    made_from = checkpoint.provenance
    content = {
        "weights_sha256": digest(weights),
        "input": "float32 [batch, 784], pixel / 255, rows top to bottom",
        "output": "float32 [batch, 10], one logit a digit, no softmax",
    }
    if "train_sha256" in made_from:
        content["train_data_sha256"] = made_from["train_sha256"]
    if "params" in made_from:
        params = json.dumps(made_from["params"], sort_keys=True)
        content["train_params_sha256"] = hashlib.sha256(params.encode()).hexdigest()
    return {f"mnist_batchnorm.{key}": value for key, value in sorted(content.items())}


def embed_provenance(proto: onnx.ModelProto, weights: Path, checkpoint: Checkpoint) -> None:
    """Write the `provenance` into the model's metadata, in place of what is there."""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, provenance(weights, checkpoint))
