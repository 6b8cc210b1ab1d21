"""Check ``structure``: the graph's interface, operators and attributes are the network's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from torch import nn

from mnist_batchnorm.parity.graph import Chain
from mnist_batchnorm.parity.layers import OPERATORS, BatchNorm, Layer, LinearOrConv
from mnist_batchnorm.parity.operators import Step
from mnist_batchnorm.parity.report import Check, verdict

OLDEST_OPSET = 9  # earlier, batch norm normalized by the batch by default


@dataclass(frozen=True)
class Interface:
    """Names, shapes and opset that callers of the ONNX file rely on; None for any.

    Shapes are those of one input or output, without the batch axis.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    input_name: str | None = None
    output_name: str | None = None
    opset: int | None = None


@dataclass(frozen=True)
class Pair:
    """A layer and the step that computes it.

    Attributes:
        layer: None if the step is additional.
        step: None if the graph lacks the layer.
        folded: the layer is a batch norm that may have been folded into the layer before it.
    """

    layer: Layer | None
    step: Step | None
    folded: bool = False


def check_structure(
    proto: onnx.ModelProto,
    chain: Chain,
    pairs: list[Pair],
    interface: Interface,
    folded: bool | None,
) -> Check:
    """Compare the graph with the network; ``folded`` is the required form of batch norm, if any."""
    graph = proto.graph
    problems = [
        *_extra_problems(proto),
        *_opset_problems(proto, interface.opset),
        *_value_problems("input", graph.input, interface.input_name, interface.input_shape),
        *_value_problems("output", graph.output, interface.output_name, interface.output_shape),
        *_batch_problems(graph, chain),
        *chain.problems,
    ]
    for pair in pairs:
        problems += _pair_problems(pair, folded)
    evidence = {
        "operators": chain.operators,
        "opset": {item.domain or "ai.onnx": item.version for item in proto.opset_import},
        "ir_version": proto.ir_version,
        "folded": [p.layer.name for p in pairs if p.layer and p.folded],
    }
    return verdict(
        "structure", problems, "the graph is the network's, operator for operator", evidence
    )


def match(layers: list[Layer], steps: list[Step]) -> list[Pair]:
    """Match layers with steps: the cheapest alignment (Needleman & Wunsch 1970).

    A batch norm that is missing right after a Linear or Conv2d costs next to nothing, because it
    may have been folded.
    """
    rows, columns = len(layers) + 1, len(steps) + 1
    cost = np.full((rows, columns), np.inf)
    cost[0, 0] = 0
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(rows):
        for j in range(columns):
            for di, dj, price in (
                (1, 1, _replacement_cost(layers[i - 1], steps[j - 1]) if i and j else np.inf),
                (1, 0, _missing_cost(layers, i - 1) if i else np.inf),
                (0, 1, 1.0 if j else np.inf),
            ):
                if price < np.inf and cost[i - di, j - dj] + price < cost[i, j]:
                    cost[i, j] = cost[i - di, j - dj] + price
                    came_from[i, j] = (di, dj)
    pairs = []
    i, j = rows - 1, columns - 1
    while i or j:
        di, dj = came_from[i, j]
        layer = layers[i - 1] if di else None
        step = steps[j - 1] if dj else None
        pairs.append(Pair(layer, step, step is None and _may_fold(layers, i - 1)))
        i, j = i - di, j - dj
    return pairs[::-1]


def _replacement_cost(layer: Layer, step: Step) -> float:
    operator = expected_step(layer.module)[0]
    if operator == step.operator:
        return 0.0
    return 1.5 if operator in {"Relu", "Clip", "LeakyRelu", "PRelu"} else 1.9


def _missing_cost(layers: list[Layer], index: int) -> float:
    return 0.01 if _may_fold(layers, index) else 1.0


def _may_fold(layers: list[Layer], index: int) -> bool:
    return (
        index > 0
        and isinstance(layers[index].module, BatchNorm)
        and isinstance(layers[index - 1].module, LinearOrConv)
    )


def expected_step(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the ONNX operator of a layer and its attributes."""
    operator = OPERATORS.get(type(module), type(module).__name__)
    return operator, _expected_attributes(module)


def _expected_attributes(module: nn.Module) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    match module:
        case nn.Linear():
            attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        case nn.Conv2d():
            attributes = _window(module) | {
                "dilations": _two(module.dilation),
                "group": module.groups,
            }
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            # ONNX's momentum weighs the old statistics, PyTorch's the new ones
            momentum = 0.0 if module.momentum is None else 1 - module.momentum
            attributes = {"epsilon": module.eps, "momentum": momentum, "training_mode": 0}
        case nn.ReLU6():
            attributes = {"min": 0.0, "max": 6.0}
        case nn.LeakyReLU():
            attributes = {"alpha": module.negative_slope}
        case nn.MaxPool2d():
            attributes = _pool(module) | {"dilations": _two(module.dilation), "storage_order": 0}
        case nn.AvgPool2d():
            padded = int(module.count_include_pad)
            attributes = _pool(module) | {"count_include_pad": padded, "dilations": [1, 1]}
    return attributes


def _pool(module: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return _window(module) | {"ceil_mode": int(module.ceil_mode)}


def _window(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        "auto_pad": "NOTSET",
        "kernel_shape": _two(module.kernel_size),
        "pads": _two(module.padding) * 2,
        "strides": _two(module.stride),
    }


def _two(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _pair_problems(pair: Pair, folded: bool | None) -> list[str]:
    layer, step = pair.layer, pair.step
    if layer is None:
        assert step is not None
        return [f"{step.where} is additional: the network has no {step.operator} there"]
    operator, attributes = expected_step(layer.module)
    problems = []
    if step is None:
        if not pair.folded:
            problems = [f"{layer.name} ({operator}) is missing"]
        elif folded is False:
            problems = [f"{layer.name} is not kept as {operator}"]
    elif step.operator != operator:
        problems = [f"{step.where} stands where {layer.name} ({operator}) belongs"]
    elif folded is True and operator == "BatchNormalization":
        problems = [f"{layer.name} is kept as {operator}, expected to be folded"]
    else:
        problems = _attribute_problems(layer, step, attributes)
    return problems


def _attribute_problems(layer: Layer, step: Step, expected: dict[str, Any]) -> list[str]:
    given = dict(step.attributes)
    features = given.pop("features", -1)
    if features not in {-1, *layer.shape}:
        return [f"{step.where} makes rows of {features} numbers, {layer.name} of {layer.shape}"]
    return [
        f"{step.where}: {key} is {_shown(given.get(key))}, {layer.name} has "
        f"{_shown(expected.get(key))}"
        for key in sorted(given.keys() | expected.keys())
        if key not in given or key not in expected or not _same(given[key], expected[key])
    ]


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(got, float | int):
        return bool(np.float32(got) == np.float32(expected))  # attributes are stored as float32
    return bool(got == expected)


def _extra_problems(proto: onnx.ModelProto) -> list[str]:
    unread = {
        "functions": proto.functions,
        "training_info": proto.training_info,
        "configuration": proto.configuration,
        "sparse_initializer": proto.graph.sparse_initializer,
        "quantization_annotation": proto.graph.quantization_annotation,
    }
    return [f"holds {name}, which no check reads" for name, part in unread.items() if part]


def _opset_problems(proto: onnx.ModelProto, opset: int | None) -> list[str]:
    domains = [item.domain or "ai.onnx" for item in proto.opset_import]
    if domains != ["ai.onnx"]:
        return [f"imports operators of {', '.join(domains) or 'nothing'}, expected ai.onnx alone"]
    got, newest = proto.opset_import[0].version, onnx.defs.onnx_opset_version()
    if opset is not None and got != opset:
        return [f"opset is {got}, expected {opset}"]
    known = OLDEST_OPSET <= got <= newest
    return [] if known else [f"opset is {got}, expected {OLDEST_OPSET} to {newest}"]


def _value_problems(
    kind: str, values: Sequence[onnx.ValueInfoProto], name: str | None, shape: tuple[int, ...]
) -> list[str]:
    names = [value.name for value in values]
    if len(names) != 1 or name not in {None, names[0]}:
        return [f"{kind}s are {names}, expected {[name] if name else 'one'}"]
    tensor = values[0].type.tensor_type
    problems = []
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        problems.append(f"{kind} {names[0]} is {type_name(tensor.elem_type)}, expected FLOAT")
    dims = tensor.shape.dim
    got = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
    if len(dims) != len(shape) + 1 or tuple(got[1:]) != shape:
        problems.append(f"{kind} {names[0]} has shape {got}, expected {['batch', *shape]}")
    if got and isinstance(got[0], int):
        problems.append(f"batch axis of {kind} {names[0]} is fixed at {got[0]}, expected symbolic")
    return problems


def _batch_problems(graph: onnx.GraphProto, chain: Chain) -> list[str]:
    problems = []
    ends = {value.name: value for value in (*graph.input, *graph.output)}
    symbols = {axis for value in ends.values() if isinstance(axis := batch_axis(value), str)}
    if len(symbols - {""}) > 1:
        problems.append(f"batch axes have different names: {', '.join(sorted(symbols))}")
    for value in graph.value_info:
        axis = batch_axis(value)
        if value.name in ends:
            if value.type != ends[value.name].type:
                problems.append(f"{value.name} is described twice, and differently")
        elif value.name in chain.values and isinstance(axis, int):
            problems.append(f"batch axis of {value.name} is fixed at {axis}, expected symbolic")
    return problems


def batch_axis(value: onnx.ValueInfoProto) -> int | str | None:
    """Return a value's first axis: its size, its symbol, or None for a scalar."""
    dims = value.type.tensor_type.shape.dim
    if not dims:
        return None
    return int(dims[0].dim_value) if dims[0].HasField("dim_value") else str(dims[0].dim_param)


def type_name(data_type: int) -> str:
    """Return ONNX's name of an element type; the number if it has none."""
    names: dict[int, str] = {n: name for name, n in onnx.TensorProto.DataType.items()}
    return names.get(data_type, str(data_type))
