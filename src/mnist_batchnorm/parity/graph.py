"""What an ONNX graph computes, independent of the exporter that wrote it.

Exporters spell one network in many ways: weights through Identity or Transpose nodes, Gemm or
MatMul and Add, Flatten or a Reshape to a computed shape. `read_chain` evaluates constants, and
reads what is left as one chain of operators from the input to the output, each with its attributes
and tensors. Everything that is not such a chain is a problem.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import numpy_helper

from mnist_batchnorm.parity.operators import BATCH, DEFAULTS, Array, Step, join_bias, to_step
from mnist_batchnorm.parity.report import one_line

# evaluated if their inputs are constants; they only move numbers, computing operators stay visible
CONSTANT_OPERATORS = {
    *("Cast", "CastLike", "Concat", "Constant", "Expand", "Gather", "Identity"),
    *("Reshape", "Shape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
}
MAX_CONSTANT_SIZE = 10**8  # elements; an Expand could request any size


@dataclass(frozen=True)
class Chain:
    """A graph as a chain of steps.

    Attributes:
        steps: operators in order.
        problems: everything in the graph that is not part of the chain.
        operators: ONNX operators, as in the file.
        values: names of the values between the steps.
        stored: the file's tensors by name.
    """

    steps: list[Step]
    problems: list[str]
    operators: list[str]
    values: list[str]
    stored: dict[str, Array]


def decode(content: bytes) -> onnx.ModelProto | str:
    """Parse an ONNX file, or return a message why it is invalid."""
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


def messages_in(message: Message) -> Iterator[Message]:
    """Yield a protobuf message and all messages inside it."""
    yield message
    for field_, value in message.ListFields():
        if field_.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from messages_in(part)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data lies in another file."""
    return bool(tensor.data_location == tensor.EXTERNAL or tensor.external_data)


def _undecodable(proto: onnx.ModelProto) -> list[str]:
    # protobuf does not validate UTF-8
    found = set()
    for part in messages_in(proto):
        for field_, value in part.ListFields():
            texts = [value] if isinstance(value, str | bytes) else value
            if field_.type == field_.TYPE_STRING and any(isinstance(t, bytes) for t in texts):
                found.add(f"{part.DESCRIPTOR.name}.{field_.name}")
    return sorted(found)


def file_problems(proto: onnx.ModelProto) -> list[str]:
    """Return why a model is not valid ONNX in a single file without unknown content."""
    problems = []
    tensors = [part for part in messages_in(proto) if isinstance(part, onnx.TensorProto)]
    external = [tensor.name for tensor in tensors if is_external(tensor)]
    if external:
        problems.append(f"weights outside the file: {', '.join(external)}")
    unknown = sum(len(UnknownFieldSet(part)) for part in messages_in(proto))
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
    """Read a graph, valid or not, as a chain."""
    return _Reader(proto).read()


class _Reader:
    """Reads the nodes in their order, which ONNX requires to be topological."""

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
            if is_external(tensor):
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
        return Chain(join_bias(self.steps), self.problems, operators, self.values, stored)

    def _used(self) -> set[str]:
        used = {value.name for value in self.graph.output}
        for node in reversed(self.graph.node):
            if used & set(node.output):
                used |= {*node.input, *node.output}  # a second output is a problem of its own
        return used

    def _node(self, where: str, node: onnx.NodeProto) -> None:
        if node.domain not in {"", "ai.onnx"} or node.overload:
            self.problems.append(f"{where} is not of ONNX's own but {node.domain}:{node.overload}")
        elif self._evaluate_constant(node):
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
        step = to_step(node.op_type, where, attributes, constants)
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

    def _evaluate_constant(self, node: onnx.NodeProto) -> bool:
        """Evaluate a node that reads only constants or a shape; return whether it could."""
        if node.op_type not in CONSTANT_OPERATORS or len(node.output) != 1:
            return False
        inputs = list(node.input)
        known = self.constants
        if node.op_type == "Shape" and inputs[0] not in known and inputs[0] in self.shapes:
            shape = self.shapes[inputs[0]]
            cut = {a.name: a.i for a in node.attribute}
            self.constants[node.output[0]] = shape[cut.get("start", 0) : cut.get("end")]
            return True
        if node.op_type == "CastLike" and inputs[0] in known and inputs[1] not in known:
            # the type of the data: float32 by the interface
            known = known | {inputs[1]: np.zeros(1, np.float32)}
        if not all(name in known for name in inputs if name):
            return False
        if node.op_type == "Expand" and np.prod(np.abs(known[inputs[1]])) > MAX_CONSTANT_SIZE:
            return False
        try:
            (result,) = _evaluate(self.proto, node, known)
        except Exception:  # noqa: BLE001 - any error means: not a constant
            return False
        self.constants[node.output[0]] = np.asarray(result)
        return True


def _shapes(proto: onnx.ModelProto) -> dict[str, Array]:
    """Infer the shapes that are known except for the batch axis, which is `BATCH`."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # noqa: BLE001 - an invalid graph; the checker reports it
        return {}
    shapes = {}
    for value in (*graph.input, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if dims and all(dim.HasField("dim_value") for dim in dims[1:]):
            shapes[value.name] = np.array([BATCH, *(dim.dim_value for dim in dims[1:])], np.int64)
    return shapes


def _evaluate(proto: onnx.ModelProto, node: onnx.NodeProto, known: dict[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator  # 0.3 s, rarely needed

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
    """Return an attribute's value; text for a type that no supported operator has."""
    if attribute.ref_attr_name:
        return f"a reference to {attribute.ref_attr_name}"
    kind = onnx.AttributeProto
    if attribute.type in {kind.FLOAT, kind.INT, kind.INTS, kind.FLOATS}:
        value = onnx.helper.get_attribute_value(attribute)
        return list(value) if attribute.type in {kind.INTS, kind.FLOATS} else value
    if attribute.type == kind.STRING:
        return attribute.s.decode(errors="replace")
    return f"of type {kind.AttributeType.Name(attribute.type)}"
