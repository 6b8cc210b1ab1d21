"""What an ONNX graph computes, freed of how its exporter wrote it down.

The exporters spell one network in many ways: weights through Identity or Transpose nodes, Gemm or
MatMul and Add, Flatten or a Reshape to a shape that was itself computed. `read_chain` undoes that:
constants are evaluated, and what is left is one chain of operators from the input to the output,
each with its attributes and tensors. What is not such a chain is a finding.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import numpy_helper

from mnist_batchnorm.parity.report import one_line

Array = npt.NDArray[Any]

# operators that only move constants about; anything that computes with weights stays visible
CONSTANT = {
    "Cast",
    "CastLike",
    "Concat",
    "Constant",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Shape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
BATCH = -(2**40)  # stands for the batch size in a shape that the graph computes
LARGEST_CONSTANT = 10**8  # numbers; an Expand could ask for any
# What an absent attribute means: https://onnx.ai/onnx/operators/
DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "Conv": {"auto_pad": "NOTSET", "group": 1},
    "BatchNormalization": {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0},
    "LeakyRelu": {"alpha": 0.01},
    "MaxPool": {"auto_pad": "NOTSET", "ceil_mode": 0, "storage_order": 0},
    "AveragePool": {"auto_pad": "NOTSET", "ceil_mode": 0, "count_include_pad": 0},
    "Flatten": {"axis": 1},
}


@dataclass(frozen=True)
class Step:
    """One operator of the chain.

    Attributes:
        operator: ``Linear`` for Gemm and MatMul, otherwise ONNX's name.
        where: which node it is, for messages.
        attributes: all of them, defaults filled in.
        tensors: its constant inputs; of a Linear ``weight`` ``[out, in]`` and ``bias``.
    """

    operator: str
    where: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """A graph as a chain of steps.

    Attributes:
        steps: in order.
        problems: what keeps the graph from being just that chain.
        operators: ONNX's operators as the file has them.
        values: names of what flows from step to step.
        stored: the file's tensors by name.
    """

    steps: list[Step]
    problems: list[str]
    operators: list[str]
    values: list[str]
    stored: dict[str, Array]


def decode(content: bytes) -> onnx.ModelProto | str:
    """Parse the bytes of an ONNX file, or say why they are none."""
    if not content:
        return "the file is empty"
    try:
        proto = onnx.load_from_string(content)
    except DecodeError as error:
        return f"not an ONNX file, or only a part of one: {one_line(error)}"
    if not proto.HasField("graph"):
        return "holds no graph"
    if names := _undecodable(proto):
        return f"text that is not UTF-8 in {', '.join(names)}"
    return proto


def parts(message: Message) -> Iterator[Message]:
    """Yield a message and every message inside it."""
    yield message
    for field_, value in message.ListFields():
        if field_.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from parts(part)


def _undecodable(proto: onnx.ModelProto) -> list[str]:
    """Name the fields whose text is not UTF-8, as ``Message.field``; protobuf lets them pass."""
    found = set()
    for part in parts(proto):
        for field_, value in part.ListFields():
            texts = [value] if isinstance(value, str | bytes) else value
            if field_.type == field_.TYPE_STRING and any(isinstance(t, bytes) for t in texts):
                found.add(f"{part.DESCRIPTOR.name}.{field_.name}")
    return sorted(found)


def file_problems(proto: onnx.ModelProto) -> list[str]:
    """Tell what keeps a model from being valid ONNX in one file, with nothing unread in it."""
    problems = []
    tensors = [part for part in parts(proto) if isinstance(part, onnx.TensorProto)]
    external = [t.name for t in tensors if t.data_location == t.EXTERNAL or t.external_data]
    if external:
        problems.append(f"weights outside the file: {', '.join(external)}")
    unknown = sum(len(UnknownFieldSet(part)) for part in parts(proto))
    if unknown:
        problems.append(f"{unknown} fields that are not ONNX's")
    if twice := [name for name, n in Counter(_defined(proto.graph)).items() if n > 1]:
        problems.append(f"names defined twice: {', '.join(twice)}")
    if not external:
        try:
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:  # noqa: BLE001 - its errors share no other base
            problems.append(f"onnx.checker refuses it: {one_line(error)}")
    return problems


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in (*graph.input, *graph.initializer))
    yield from (name for node in graph.node for name in node.output if name)


def read_chain(proto: onnx.ModelProto) -> Chain:
    """Read a graph as a chain; `file_problems` need not be empty."""
    return _Reader(proto).read()


class _Reader:
    """Walks the nodes once, in their order, which ONNX demands to be topological."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.graph = proto.graph
        self.constants: dict[str, Array] = {}
        self.steps: list[Step] = []
        self.problems: list[str] = []
        self.shapes: dict[str, Array] = {}
        self.values: list[str] = []

    def read(self) -> Chain:
        for tensor in self.graph.initializer:
            if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
                self.problems.append(f"tensor {tensor.name!r} is not in the file")
                continue
            try:
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
            except Exception as error:  # noqa: BLE001 - too few bytes, an unknown type, ...
                self.problems.append(f"tensor {tensor.name!r} cannot be read: {one_line(error)}")
        stored = dict(self.constants)
        self.shapes = _shapes(self.proto)
        self.value = self.graph.input[0].name if self.graph.input else ""
        for index, node in enumerate(self.graph.node):
            self._node(f"node {index} ({node.op_type}{f' {node.name}' if node.name else ''})", node)
        outputs = [value.name for value in self.graph.output]
        if outputs[:1] != [self.value]:
            self.problems.append(f"the last operator writes {self.value!r}, outputs are {outputs}")
        if unused := sorted(set(_defined(self.graph)) - self._used()):
            self.problems.append(f"stored or computed, but not used: {', '.join(unused)}")
        operators = [node.op_type for node in self.graph.node]
        return Chain(_joined(self.steps), self.problems, operators, self.values, stored)

    def _used(self) -> set[str]:
        used = {value.name for value in self.graph.output}
        for node in reversed(self.graph.node):
            if used & set(node.output):
                used |= {*node.input, *node.output}  # a second output is a finding of its own
        return used

    def _node(self, where: str, node: onnx.NodeProto) -> None:
        if node.domain not in {"", "ai.onnx"} or node.overload:
            self.problems.append(f"{where} is not of ONNX's own but {node.domain}:{node.overload}")
        elif self._constant(node):
            return
        attributes = self._attributes(where, node)
        data = [name for name in node.input if name and name not in self.constants]
        outputs = [name for name in node.output if name]
        first = node.input[:1] == [self.value] or node.op_type == "Add"  # a bias may come first
        if data != [self.value] or not first:
            self.problems.append(f"{where} reads {data}, expected [{self.value!r}] alone and first")
        if len(outputs) != 1:
            self.problems.append(f"{where} has {len(outputs)} outputs, expected 1")
        constants = {
            str(i): self.constants[name]
            for i, name in enumerate(node.input)
            if name in self.constants
        }
        step = _step(node.op_type, where, attributes, constants)
        if isinstance(step, str):
            self.problems.append(f"{where} {step}")
            step = Step(node.op_type, where, attributes, constants)
        if step.operator not in {"Identity", "Dropout"} or step.attributes.get("training_mode"):
            self.steps.append(step)
        self.value = outputs[0] if outputs else ""
        self.values.append(self.value)

    def _attributes(self, where: str, node: onnx.NodeProto) -> dict[str, Any]:
        given = {a.name: attribute_value(a) for a in node.attribute}
        if len(given) != len(node.attribute):
            self.problems.append(f"{where} has an attribute twice")
        return DEFAULTS.get(node.op_type, {}) | given

    def _constant(self, node: onnx.NodeProto) -> bool:
        """Evaluate a node that reads constants only, or the shape of something."""
        if node.op_type not in CONSTANT or len(node.output) != 1:
            return False
        inputs = list(node.input)
        known = self.constants
        if node.op_type == "Shape" and inputs[0] not in known and inputs[0] in self.shapes:
            shape = self.shapes[inputs[0]]
            cut = {a.name: a.i for a in node.attribute}
            self.constants[node.output[0]] = shape[cut.get("start", 0) : cut.get("end")]
            return True
        if node.op_type == "CastLike" and inputs[0] in known and inputs[1] not in known:
            # the type of the data, which the interface fixes
            known = known | {inputs[1]: np.zeros(1, np.float32)}
        if not all(name in known for name in inputs if name):
            return False
        if node.op_type == "Expand" and np.prod(np.abs(known[inputs[1]])) > LARGEST_CONSTANT:
            return False
        try:
            (result,) = _evaluate(self.proto, node, known)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it is no constant then
            return False
        self.constants[node.output[0]] = np.asarray(result)
        return True


def _shapes(proto: onnx.ModelProto) -> dict[str, Array]:
    """Infer the shapes that are known but for the batch axis, which they give as `BATCH`."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # noqa: BLE001 - a graph that is not valid; the checker says so
        return {}
    shapes = {}
    for value in (*graph.input, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if dims and all(dim.HasField("dim_value") for dim in dims[1:]):
            shapes[value.name] = np.array([BATCH, *(dim.dim_value for dim in dims[1:])], np.int64)
    return shapes


def _evaluate(proto: onnx.ModelProto, node: onnx.NodeProto, known: dict[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator  # 0.3 s that most graphs do not need

    values = {name: known[name] for name in node.input if name}
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), None
        )
        for name, value in values.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = onnx.helper.make_graph([node], "one node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=list(proto.opset_import))
    result: list[Array] = ReferenceEvaluator(model).run(None, values)
    return result


def attribute_value(attribute: onnx.AttributeProto) -> Any:
    """Return a node's attribute as Python has it; text for what no operator here may have."""
    if attribute.ref_attr_name:
        return f"a reference to {attribute.ref_attr_name}"
    kind = onnx.AttributeProto
    if attribute.type in {kind.FLOAT, kind.INT, kind.INTS, kind.FLOATS}:
        value = onnx.helper.get_attribute_value(attribute)
        return list(value) if attribute.type in {kind.INTS, kind.FLOATS} else value
    if attribute.type == kind.STRING:
        return attribute.s.decode(errors="replace")
    return f"of type {kind.AttributeType.Name(attribute.type)}"


Attributes = dict[str, Any]
Tensors = dict[str, Array]


def _step(operator: str, where: str, attributes: Attributes, constants: Tensors) -> Step | str:
    """Write a node in the one spelling of its operator, or say why it has none."""
    rule = _RULES.get(operator)
    if rule is None:
        return Step(operator, where, attributes, constants)
    try:
        name, attributes, tensors = rule(dict(attributes), constants)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"has an unexpected attribute or tensor: {type(error).__name__} {error}"
    return Step(name, where, attributes, tensors)


def _gemm(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    turned = {0: constants["1"].T, 1: constants["1"]}[attributes.pop("transB")]
    tensors = {"weight": np.ascontiguousarray(turned)}
    return "Linear", attributes, tensors | ({"bias": constants["2"]} if "2" in constants else {})


def _matmul(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    neutral = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return "Linear", attributes | neutral, {"weight": np.ascontiguousarray(constants["1"].T)}


def _conv(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    weight = constants["1"]
    axes = weight.ndim - 2
    filled = {
        "dilations": [1] * axes,
        "kernel_shape": list(weight.shape[2:]),
        "pads": [0] * 2 * axes,
        "strides": [1] * axes,
    }
    tensors = {"weight": weight} | ({"bias": constants["2"]} if "2" in constants else {})
    return "Conv", filled | attributes, tensors


def _batch_norm(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: constants[str(i + 1)] for i, name in enumerate(names)}
    return "BatchNormalization", attributes, tensors


def _prelu(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    return "PRelu", attributes, {"weight": constants["1"].reshape(-1)}


def _clip(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    bounds = {"min": constants.get("1"), "max": constants.get("2")}
    given = {name: float(bound.item()) for name, bound in bounds.items() if bound is not None}
    return "Clip", attributes | given, {}


def _pool(name: str) -> Callable[[Attributes, Tensors], tuple[str, Attributes, Tensors]]:
    def rule(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
        axes = len(attributes["kernel_shape"])
        filled = {"dilations": [1] * axes, "pads": [0] * 2 * axes, "strides": [1] * axes}
        return name, filled | attributes, constants

    return rule


def _mean(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    axes = constants["1"].tolist() if "1" in constants else attributes["axes"]
    if sorted(axes) in ([2, 3], [-2, -1]) and attributes.get("keepdims", 1) == 1:
        return "GlobalAveragePool", {}, {}
    return "ReduceMean", attributes, constants


def _flatten(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    if attributes["axis"] == 1:
        return "Flatten", {"features": -1}, {}
    return "Flatten", attributes, constants


def _reshape(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    """Recognize a flattening: the batch axis kept, all others made one."""
    shape = constants["1"].tolist()
    batch = {BATCH, -1} if attributes.get("allowzero") else {BATCH, -1, 0}
    if len(shape) == 2 and shape[0] in batch and shape != [-1, -1] and shape[1] != 0:
        return "Flatten", {"features": shape[1]}, {}
    return "Reshape", attributes, constants


def _dropout(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    training = bool(constants["2"]) if "2" in constants else False
    return "Dropout", attributes | {"training_mode": int(training)}, constants


_RULES: dict[str, Callable[[Attributes, Tensors], tuple[str, Attributes, Tensors]]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "PRelu": _prelu,
    "Clip": _clip,
    "MaxPool": _pool("MaxPool"),
    "AveragePool": _pool("AveragePool"),
    "ReduceMean": _mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Dropout": _dropout,
}


def _joined(steps: list[Step]) -> list[Step]:
    """Join a MatMul with the Add of its bias."""
    joined: list[Step] = []
    for step in steps:
        last = joined[-1] if joined else None
        if (
            step.operator == "Add"
            and last is not None
            and last.operator == "Linear"
            and last.tensors.keys() == {"weight"}
            and [tensor.shape for tensor in step.tensors.values()]
            == [last.tensors["weight"].shape[:1]]
        ):
            (bias,) = step.tensors.values()
            joined[-1] = replace(last, tensors=last.tensors | {"bias": bias})
        else:
            joined.append(step)
    return joined
