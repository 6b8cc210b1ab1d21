"""Is the graph the network's: interface, operators, attributes, and nothing else?"""

from typing import Any

import numpy as np
import onnx

from mnist_batchnorm.model import Architecture
from mnist_batchnorm.parity.report import Check, verdict

GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
# What an absent attribute means: https://onnx.ai/onnx/operators/
DEFAULTS = {
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "BatchNormalization": {"epsilon": 1e-5, "training_mode": 0},
    "Relu": {},
}
IGNORED = {"momentum"}  # of BatchNormalization: it has no effect outside training mode


def check_structure(proto: onnx.ModelProto, network: Architecture) -> Check:
    """Compare the graph with the network: either form, BatchNormalization kept or folded.

    Args:
        proto: the ONNX model.
        network: what the checkpoint says it is.
    """
    problems = [
        *_file_problems(proto),
        *_interface_problems(proto, network),
        *_operator_problems(proto, network),
    ]
    evidence = {
        "operators": [node.op_type for node in proto.graph.node],
        "opset": {item.domain or "ai.onnx": item.version for item in proto.opset_import},
        "ir_version": proto.ir_version,
    }
    return verdict(
        "structure", problems, "the graph is the network's, operator for operator", evidence
    )


def is_folded(proto: onnx.ModelProto) -> bool:
    """Tell whether the graph has no BatchNormalization node left."""
    return all(node.op_type != "BatchNormalization" for node in proto.graph.node)


def _file_problems(proto: onnx.ModelProto) -> list[str]:
    problems = []
    external = [t.name for t in proto.graph.initializer if t.data_location == t.EXTERNAL]
    if external:
        return [f"weights outside the file: {', '.join(external)}"]
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        problems.append(f"onnx.checker refuses it: {error}")
    domains = {item.domain for item in proto.opset_import} - {"", "ai.onnx"}
    if domains:
        problems.append(f"operators of other domains: {', '.join(sorted(domains))}")
    if proto.graph.sparse_initializer:
        problems.append("sparse initializers, which no check reads")
    if proto.functions:
        problems.append(f"local functions: {', '.join(f.name for f in proto.functions)}")
    return problems


def _interface_problems(proto: onnx.ModelProto, network: Architecture) -> list[str]:
    # an initializer that is an input as well could be overridden by whoever calls the model
    return [
        *_value_problems("input", list(proto.graph.input), "image", network.widths[0]),
        *_value_problems("output", list(proto.graph.output), "logits", network.widths[-1]),
    ]


def _value_problems(
    kind: str, values: list[onnx.ValueInfoProto], name: str, width: int
) -> list[str]:
    if [value.name for value in values] != [name]:
        return [f"{kind}s are {[value.name for value in values]}, expected ['{name}']"]
    tensor = values[0].type.tensor_type
    problems = []
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        got = onnx.TensorProto.DataType.Name(tensor.elem_type)
        problems.append(f"{kind} {name} is {got}, expected FLOAT")
    dims = tensor.shape.dim
    if len(dims) != 2 or dims[1].dim_value != width:
        shape = [d.dim_param or d.dim_value for d in dims]
        problems.append(f"{kind} {name} has shape {shape}, expected ['batch', {width}]")
    if len(dims) > 0 and not dims[0].dim_param:
        fixed = dims[0].dim_value
        problems.append(f"batch axis of {kind} {name} is frozen at {fixed}, expected symbolic")
    return problems


def _operator_problems(proto: onnx.ModelProto, network: Architecture) -> list[str]:
    folded = is_folded(proto)
    expected = expected_operators(network, folded)
    got = [node.op_type for node in proto.graph.node]
    if got != [operator for operator, _ in expected]:
        names = [operator for operator, _ in expected]
        return [f"operators are {' '.join(got)}, expected {' '.join(names)}"]
    problems = []
    value = "image"
    for i, (node, (operator, attributes)) in enumerate(
        zip(proto.graph.node, expected, strict=True)
    ):
        where = f"node {i} ({operator} {node.name})"
        if not node.input or node.input[0] != value:
            problems.append(f"{where} reads {list(node.input)[:1]}, expected ['{value}']")
        if len(node.output) != 1:
            problems.append(f"{where} has {len(node.output)} outputs, as in training mode")
        value = node.output[0]
        problems += _attribute_problems(where, node, operator, attributes)
    if value != "logits":
        problems.append(f"the last node writes {value}, expected logits")
    return problems


def _attribute_problems(
    where: str, node: onnx.NodeProto, operator: str, expected: dict[str, Any]
) -> list[str]:
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    got = DEFAULTS[operator] | {key: given[key] for key in given if key not in IGNORED}
    return [
        f"{where}: {key} is {got.get(key)}, expected {expected.get(key)}"
        for key in sorted(got.keys() | expected.keys())
        # attributes are stored as float32
        if key not in got
        or key not in expected
        or np.float32(got[key]) != np.float32(expected[key])
    ]


def expected_operators(network: Architecture, folded: bool) -> list[tuple[str, dict[str, Any]]]:
    """List the operators, with attributes, that the network becomes."""
    batch_norm = [("BatchNormalization", {"epsilon": network.bn_eps, "training_mode": 0})]
    hidden: list[tuple[str, dict[str, Any]]] = [
        ("Gemm", GEMM),
        *(batch_norm if network.batch_norm and not folded else []),
        ("Relu", {}),
    ]
    return [*hidden * (len(network.widths) - 2), ("Gemm", GEMM)]
