"""Is the graph the network's: interface, operators, attributes, and nothing else?"""

from typing import Any

import numpy as np
import onnx

from mnist_batchnorm.model import Architecture
from mnist_batchnorm.parity.report import Check, one_line, verdict

GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
# What an absent attribute means: https://onnx.ai/onnx/operators/
DEFAULTS = {
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "BatchNormalization": {"epsilon": 1e-5, "training_mode": 0},
    "Relu": {},
}
IGNORED = {"momentum"}  # of BatchNormalization: it has no effect outside training mode


def check_structure(proto: onnx.ModelProto, network: Architecture, folded: bool) -> Check:
    """Compare the graph with the network.

    Args:
        proto: the ONNX model; `file_problems` finds none.
        network: what the checkpoint says it is.
        folded: whether batch norm must be folded into the Gemm before, or must have been kept.
    """
    problems = [
        *_extra_problems(proto),
        *_interface_problems(proto, network),
        *_operator_problems(proto, network, folded),
    ]
    evidence = {
        "operators": [node.op_type for node in proto.graph.node],
        "opset": {item.domain or "ai.onnx": item.version for item in proto.opset_import},
        "ir_version": proto.ir_version,
    }
    return verdict(
        "structure", problems, "the graph is the network's, operator for operator", evidence
    )


def file_problems(proto: onnx.ModelProto) -> list[str]:
    """Tell what keeps a model from being valid ONNX in one file, which all else builds on."""
    external = [t.name for t in proto.graph.initializer if t.data_location == t.EXTERNAL]
    if external:
        return [f"weights outside the file: {', '.join(external)}"]
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # noqa: BLE001 - its errors share no other base
        return [f"onnx.checker refuses it: {one_line(error)}"]
    return []


def _extra_problems(proto: onnx.ModelProto) -> list[str]:
    unread = {
        "functions": proto.functions,
        "training_info": proto.training_info,
        "configuration": proto.configuration,
        "sparse_initializer": proto.graph.sparse_initializer,
        "quantization_annotation": proto.graph.quantization_annotation,
    }
    problems = [f"holds {name}, which no check reads" for name, part in unread.items() if part]
    domains = [item.domain or "ai.onnx" for item in proto.opset_import]
    if domains != ["ai.onnx"]:
        problems.append(f"imports operators of {', '.join(domains)}, expected ai.onnx alone")
    return problems


def _interface_problems(proto: onnx.ModelProto, network: Architecture) -> list[str]:
    # an initializer that is an input as well could be overridden by whoever calls the model
    graph = proto.graph
    return [
        *_value_problems("input", list(graph.input), "image", network.widths[0]),
        *_value_problems("output", list(graph.output), "logits", network.widths[-1]),
        *_batch_problems(graph),
    ]


def _batch_problems(graph: onnx.GraphProto) -> list[str]:
    problems = []
    symbols = {_batch_axis(value) for value in (*graph.input, *graph.output)}
    if len(symbols) > 1:
        problems.append(
            f"batch axes of input and output differ: {', '.join(sorted(map(str, symbols)))}"
        )
    computed = {name for node in graph.node for name in node.output}
    for value in graph.value_info:
        axis = _batch_axis(value)
        if value.name in computed and isinstance(axis, int):
            problems.append(f"batch axis of {value.name} is frozen at {axis}, expected symbolic")
    return problems


def _batch_axis(value: onnx.ValueInfoProto) -> str | int | None:
    dims = value.type.tensor_type.shape.dim
    if not dims:
        return None
    return int(dims[0].dim_value) if dims[0].HasField("dim_value") else str(dims[0].dim_param)


def _value_problems(
    kind: str, values: list[onnx.ValueInfoProto], name: str, width: int
) -> list[str]:
    if [value.name for value in values] != [name]:
        return [f"{kind}s are {[value.name for value in values]}, expected ['{name}']"]
    tensor = values[0].type.tensor_type
    problems = []
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        problems.append(f"{kind} {name} is {type_name(tensor.elem_type)}, expected FLOAT")
    dims = tensor.shape.dim
    if len(dims) != 2 or dims[1].dim_value != width:
        shape = [d.dim_param or d.dim_value for d in dims]
        problems.append(f"{kind} {name} has shape {shape}, expected ['batch', {width}]")
    if len(dims) > 0 and not dims[0].dim_param:
        fixed = dims[0].dim_value
        problems.append(f"batch axis of {kind} {name} is frozen at {fixed}, expected symbolic")
    return problems


def _operator_problems(proto: onnx.ModelProto, network: Architecture, folded: bool) -> list[str]:
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
        value = next(iter(node.output), "")
        problems += _attribute_problems(where, node, operator, attributes)
    if value != "logits":
        problems.append(f"the last node writes {value}, expected logits")
    return problems


def _attribute_problems(
    where: str, node: onnx.NodeProto, operator: str, expected: dict[str, Any]
) -> list[str]:
    given = {a.name: _attribute_value(a) for a in node.attribute}
    got = DEFAULTS[operator] | {key: given[key] for key in given if key not in IGNORED}
    return [
        f"{where}: {key} is {got.get(key)}, expected {expected.get(key)}"
        for key in sorted(got.keys() | expected.keys())
        if key not in got or key not in expected or not _same(got[key], expected[key])
    ]


def _attribute_value(attribute: onnx.AttributeProto) -> float | str:
    if attribute.ref_attr_name:
        return f"a reference to {attribute.ref_attr_name}"
    if attribute.type == onnx.AttributeProto.FLOAT:
        return float(attribute.f)
    if attribute.type == onnx.AttributeProto.INT:
        return int(attribute.i)
    return f"of type {onnx.AttributeProto.AttributeType.Name(attribute.type)}"


def _same(got: float | str, expected: float) -> bool:
    # attributes are stored as float32
    return not isinstance(got, str) and bool(np.float32(got) == np.float32(expected))


def type_name(data_type: int) -> str:
    """Return what ONNX calls an element type; the number itself where it has no name."""
    names: dict[int, str] = {n: name for name, n in onnx.TensorProto.DataType.items()}
    return names.get(data_type, str(data_type))


def expected_operators(network: Architecture, folded: bool) -> list[tuple[str, dict[str, Any]]]:
    """List the operators, with attributes, that the network becomes."""
    batch_norm = [("BatchNormalization", {"epsilon": network.bn_eps, "training_mode": 0})]
    hidden: list[tuple[str, dict[str, Any]]] = [
        ("Gemm", GEMM),
        *(batch_norm if network.batch_norm and not folded else []),
        ("Relu", {}),
    ]
    return [*hidden * (len(network.widths) - 2), ("Gemm", GEMM)]
