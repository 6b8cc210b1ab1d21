"""Diagnosis: mistakes that show in the graph, its interface and its metadata."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from mnist_batchnorm.parity.graph import Chain, is_external, messages_in
from mnist_batchnorm.parity.layers import OPERATORS, BatchNorm, Layer
from mnist_batchnorm.parity.operators import Array, Step
from mnist_batchnorm.parity.report import Check, Diagnosis
from mnist_batchnorm.parity.structure import Interface, Pair, batch_axis, expected_step, type_name

ACTIVATIONS = {
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "Tanh"),
    *("HardSigmoid", "HardSwish", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Swish"),
    *("Abs", "Erf", "Shrink"),
}
PROBABILITIES = {"Softmax", "LogSoftmax", "Sigmoid", "Hardmax"}
CHOICES = {"ArgMax", "ArgMin", "TopK", "OneHot"}
SCALING = {"Mul", "Div", "Neg"}
ARITHMETIC = {"Add", "Sub"}
RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial"),
}
HALVES = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
NORMALIZATIONS = {
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization"),
    *("RMSNormalization", "LpNormalization", "MeanVarianceNormalization"),
}
QUANTIZED = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"),
    *("ConvInteger", "QLinearMatMul", "QLinearConv"),
}


@dataclass(frozen=True)
class Findings:
    """The input of a diagnosis.

    Attributes:
        proto: ONNX model.
        chain: its operators.
        pairs: the operators matched with the network's layers; empty if some are unsupported.
        interface: what callers of the file rely on.
        folds: the exporter's own folded tensors by layer and name, if it folds.
        checks: the checks by name.
    """

    proto: onnx.ModelProto
    chain: Chain
    pairs: list[Pair]
    interface: Interface
    folds: dict[str, dict[str, Array]]
    checks: dict[str, Check]

    @property
    def matched(self) -> list[tuple[Layer, Step]]:
        """Layers that the file has, with their steps."""
        return [(pair.layer, pair.step) for pair in self.pairs if pair.layer and pair.step]

    @property
    def tensors(self) -> list[onnx.TensorProto]:
        """All tensors in the file, including those in attributes."""
        return [part for part in messages_in(self.proto) if isinstance(part, onnx.TensorProto)]

    @property
    def operators(self) -> set[str]:
        """All operators in the file, including those in functions and subgraphs."""
        nodes = (part for part in messages_in(self.proto) if isinstance(part, onnx.NodeProto))
        return {node.op_type for node in nodes}


def container(findings: Findings) -> Iterator[Diagnosis]:
    outside = [t.name for t in findings.tensors if is_external(t)]
    if outside:
        yield Diagnosis("external-data", f"weights lie in another file: {', '.join(outside)}")
    inputs = [value.name for value in findings.proto.graph.input]
    if len(set(inputs)) < len(inputs):
        yield Diagnosis("corrupt-file", "two ONNX files, one after the other")
    for problem in (*findings.checks["structure"].problems, *findings.checks["file"].problems):
        signs = ("ir_version", "operators of nothing")
        if problem.startswith("opset") or any(sign in problem for sign in signs):
            yield Diagnosis("opset", problem)
    versions = [item.domain or "ai.onnx" for item in findings.proto.opset_import]
    if versions.count("ai.onnx") > 1:
        yield Diagnosis("opset", "more than one version of ONNX's operators is declared")


def mode(findings: Findings) -> Iterator[Diagnosis]:
    for node in findings.proto.graph.node:
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        outputs = len([name for name in node.output if name])
        if node.op_type == "BatchNormalization" and (training or outputs > 1):
            text = "exported in training mode: batch norm normalizes by the batch it is served"
            yield Diagnosis("training-mode", text)
    if any(step.operator == "Dropout" for step in findings.chain.steps):
        yield Diagnosis("active-dropout", "Dropout is in training mode: it drops units at random")
    if found := findings.operators & RANDOM:
        yield Diagnosis("random", f"computes with random numbers: {', '.join(sorted(found))}")


def precision(findings: Findings) -> Iterator[Diagnosis]:
    if found := {o for o in findings.operators if o in QUANTIZED or o.startswith("QLinear")}:
        yield Diagnosis("quantized", f"computes with integers: {', '.join(sorted(found))}")
    types = {tensor.data_type for tensor in findings.tensors}
    yield from (Diagnosis(n, f"holds weights in {n}") for t, n in HALVES.items() if t in types)


def casts(findings: Findings) -> Iterator[Diagnosis]:
    nodes = [node for node in findings.proto.graph.node if node.op_type == "Cast"]
    types = {a.i for node in nodes for a in node.attribute if a.name == "to"}
    yield from (Diagnosis(n, f"computes in {n}") for t, n in HALVES.items() if t in types)


def batch_axis_frozen(findings: Findings) -> Iterator[Diagnosis]:
    graph = findings.proto.graph
    shapes = findings.interface.input_shape, findings.interface.output_shape
    ends = zip((graph.input, graph.output), shapes, strict=True)
    own = [value for values, shape in ends for value in values[:1] if _inner_shape(value) == shape]
    inside = [value for value in graph.value_info if value.name in findings.chain.values]
    for value in (*own, *inside):
        if isinstance(axis := batch_axis(value), int):
            yield Diagnosis("frozen-batch", f"batch axis fixed at {axis} ({value.name})")
    for step in findings.chain.steps:
        shape = step.tensors.get("1")
        if step.operator == "Reshape" and shape is not None and shape.size and shape.flat[0] > 1:
            text = f"batch axis fixed at {shape.flat[0]} inside ({step.where})"
            yield Diagnosis("frozen-batch", text)


def _inner_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])


def interface(findings: Findings) -> Iterator[Diagnosis]:
    graph, expected = findings.proto.graph, findings.interface
    if len(graph.output) == 1 and any(s.operator in CHOICES for s in findings.chain.steps):
        yield Diagnosis("argmax-output", "the graph ends in the class, not in logits")
    if findings.pairs and findings.pairs[-1].layer and findings.pairs[-1].step is None:
        text = f"the output is not that of {findings.pairs[-1].layer.name}, the last layer"
        yield Diagnosis("wiring", text)
    for kind, values, name, shape in (
        ("input", graph.input, expected.input_name, expected.input_shape),
        ("output", graph.output, expected.output_name, expected.output_shape),
    ):
        names = [value.name for value in values]
        if len(names) != 1 or name not in {None, names[0]}:
            yield Diagnosis("interface", f"{kind}s are {names}, not {[name] if name else 'one'}")
            continue
        tensor = values[0].type.tensor_type
        if tensor.elem_type != onnx.TensorProto.FLOAT:
            text = f"{kind} {names[0]} is {type_name(tensor.elem_type)}, not FLOAT"
            yield Diagnosis("interface", text)
        elif _inner_shape(values[0]) != shape:
            axes = ", ".join(["batch", *map(str, shape)])
            yield Diagnosis("interface", f"{kind} {names[0]} is not [{axes}]")


def coupled_rows(findings: Findings) -> Iterator[Diagnosis]:
    check = findings.checks.get("invariance")
    if check is not None and check.evidence.get("rows_coupled"):
        yield Diagnosis("coupled-rows", "rows of one batch affect each other")


def foreign_operators(findings: Findings) -> Iterator[Diagnosis]:
    nodes = [node for node in findings.proto.graph.node if node.domain not in {"", "ai.onnx"}]
    if nodes:
        names = ", ".join(sorted({f"{node.domain}.{node.op_type}" for node in nodes}))
        yield Diagnosis("hidden-content", f"operators that are not ONNX's own: {names}")


def additional_operators(findings: Findings) -> Iterator[Diagnosis]:
    steps = findings.chain.steps
    own = [steps.index(step) for _, step in findings.matched]
    if not own:
        return
    before, after = steps[: own[0]], steps[own[-1] + 1 :]
    ends = {step.operator for step in after}
    if found := ends & PROBABILITIES:
        yield Diagnosis("softmax", f"{', '.join(sorted(found))} in the graph, after the logits")
    if ends == {"Gather"}:
        yield Diagnosis("permuted-labels", "the logits are put into another order")
    if ends & SCALING or (len(after) > 1 and ends & ARITHMETIC):
        yield Diagnosis("scaled-logits", f"{_names(after)} after the logits")
    if after and ends & ACTIVATIONS:
        yield Diagnosis("activation", f"{_names(after)} after the logits")
    if before and not {step.operator for step in before} & {"Linear", "Conv"}:
        text = f"{_names(before)} before the first layer: preprocessing in the graph"
        yield Diagnosis("preprocessing", text)


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(step.operator for step in steps) or "nothing"


def replaced_layers(findings: Findings) -> Iterator[Diagnosis]:
    for layer, step in findings.matched:
        expected, attributes = expected_step(layer.module)
        text = f"{layer.name} is {step.operator}, not {expected}"
        if step.operator == expected:
            if expected in ACTIVATIONS and any(
                _differs(step, key, value) for key, value in attributes.items()
            ):
                yield Diagnosis("activation", f"{layer.name} has {step.attributes}")
        elif {expected, step.operator} <= ACTIVATIONS:
            yield Diagnosis("activation", text)
        elif step.operator in NORMALIZATIONS:
            yield Diagnosis("batch-norm-missing", text)
        else:
            yield Diagnosis("wiring", text)


def moved_layers(findings: Findings) -> Iterator[Diagnosis]:
    pairs = findings.pairs
    missing = [p.layer for p in pairs if p.layer and p.step is None and not p.folded]
    added = [p.step for p in pairs if p.step and p.layer is None]
    lost, gained = {OPERATORS[type(la.module)] for la in missing}, {step.operator for step in added}
    names = ", ".join(layer.name for layer in missing) or "nothing"
    if (lost | gained) & {"Linear", "Conv"}:
        yield Diagnosis("wiring", "a layer is skipped or repeated")
    if found := gained & NORMALIZATIONS:
        yield Diagnosis("batch-norm-missing", f"{', '.join(found)} in batch norm's place")
    if not lost & gained:
        if "BatchNormalization" in lost:
            yield Diagnosis("batch-norm-missing", f"missing: {names}")
        if (lost | gained) & ACTIVATIONS:
            yield Diagnosis("activation", f"missing: {names}; additional: {_names(added)}")
    if missing or added:
        text = f"wired otherwise: missing {names}, additional {_names(added)}"
        yield Diagnosis("wiring", text)
    elif astray := [problem for problem in findings.chain.problems if " reads " in problem]:
        yield Diagnosis("wiring", "; ".join(astray[:2]))


def _differs(step: Step, key: str, expected: float) -> bool:
    return bool(np.float32(step.attributes.get(key, np.nan)) != np.float32(expected))


def attributes(findings: Findings) -> Iterator[Diagnosis]:
    windows = dict.fromkeys(("Conv", "MaxPool", "AveragePool"), "wiring")
    ids = {"Linear": "gemm-attributes"} | windows
    for layer, step in findings.matched:
        got, expected = step.attributes, expected_step(layer.module)[1]
        if isinstance(layer.module, BatchNorm):
            for key in ("epsilon", "momentum"):
                if _differs(step, key, expected[key]):
                    shown = f"{key} {got.get(key):g}, the checkpoint has {expected[key]:g}"
                    yield Diagnosis(key, f"{layer.name} has BN {shown}")
        elif step.operator in ids and got != expected:
            given = {key: got.get(key) for key in got if got.get(key) != expected.get(key)}
            yield Diagnosis(ids[step.operator], f"{layer.name} has {given}")


def origin(findings: Findings) -> Iterator[Diagnosis]:
    check = findings.checks["provenance"]
    if check.status == "failed":
        yield Diagnosis("other-checkpoint", check.detail)


def hidden_content(findings: Findings) -> Iterator[Diagnosis]:
    texts = [*findings.checks["file"].problems, *findings.checks["structure"].problems]
    signs = ("which no check reads", "not used", "not ONNX's", "imports operators")
    for text in texts:
        if any(sign in text for sign in signs):
            yield Diagnosis("hidden-content", text)


def corrupt_file(findings: Findings) -> Iterator[Diagnosis]:
    for problem in findings.checks["file"].problems:
        if "fields that are not ONNX's" in problem:
            yield Diagnosis("hidden-content", problem)
        elif not problem.startswith("weights outside"):
            yield Diagnosis("corrupt-file", problem)
