"""Export to ONNX in eval mode, without traces of the machine."""

import hashlib
import json
import logging
from collections.abc import Sequence

import onnx
import torch
from torch import nn

from mnist_batchnorm.network.frozen import require_frozen
from mnist_batchnorm.network.model import Checkpoint

INPUT, OUTPUT = "image", "logits"  # names in the ONNX file


def trace(
    model: nn.Sequential, input_shape: Sequence[int], opset: int | None = None
) -> dict[bool, onnx.ModelProto]:
    """Trace a network, on the CPU in eval mode, into two ONNX graphs.

    ``image`` float32 ``[batch, *input_shape]`` -> ``logits`` float32 ``[batch, ...]`` with a
    symbolic batch axis. The keys tell whether batch norm is folded into the layer before it.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it suggests installing torchvision
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *input_shape),),  # the exporter would treat a batch size of 1 as constant
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
        strip_environment(proto)
    return graphs


def export_onnx(
    model: nn.Sequential, input_shape: Sequence[int], opset: int
) -> dict[bool, onnx.ModelProto]:
    """Trace a network that passes `require_frozen`; see `trace`."""
    require_frozen(model)
    return trace(model, input_shape, opset)


def strip_environment(proto: onnx.ModelProto) -> None:
    """Remove what depends on the exporting machine: absolute paths, the build of PyTorch."""
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (*graph.node, *values, graph, proto):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.producer_version = proto.producer_version.partition("+")[0]  # 2.15.0+cu132


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the ONNX metadata that identifies weights, data, params and the input format.

    Hashes only, so equal checkpoints give equal metadata on every machine. Hashes that the
    checkpoint, which must have been read from a file, does not contain are left out.
    """
    assert checkpoint.sha256
    content = {
        "weights_sha256": checkpoint.sha256,
        "input": "float32 [batch, 784], pixel / 255, rows top to bottom",
        "output": "float32 [batch, 10], one logit a digit, no softmax",
    }
    if "train_sha256" in checkpoint.provenance:
        content["train_data_sha256"] = checkpoint.provenance["train_sha256"]
    if "params" in checkpoint.provenance:
        params = json.dumps(checkpoint.provenance["params"], sort_keys=True)
        content["train_params_sha256"] = hashlib.sha256(params.encode()).hexdigest()
    return {f"mnist_batchnorm.{key}": value for key, value in sorted(content.items())}


def embed_provenance(proto: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    """Replace the model's metadata by its `provenance`."""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, provenance(checkpoint))
