"""Which mistake would explain what the checks found? Named, the likeliest first.

A diagnosis decides nothing: a file is stopped because a check failed, whatever its name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx
from torch import nn

from mnist_batchnorm.parity import numbers
from mnist_batchnorm.parity.graph import Chain, Step, parts
from mnist_batchnorm.parity.numbers import Changed
from mnist_batchnorm.parity.report import Check, Diagnosis
from mnist_batchnorm.parity.structure import (
    OPERATORS,
    Interface,
    Pair,
    batch_axis,
    expected_step,
    type_name,
)
from mnist_batchnorm.parity.weights import Fused, bits, fused, stored_tensors, tensors_of

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


# what the numbers say so clearly that nothing about batch norm can explain it better
SURE = {
    *("byte-order", "not-finite", "bit-flip", "permuted-units", "permuted-labels"),
    *("float16", "bfloat16", "tf32", "rounded-decimals", "quantized", "transposed-weight"),
}


@dataclass(frozen=True)
class Findings:
    """All that a diagnosis may look at.

    Attributes:
        proto: the ONNX model.
        chain: its operators, read.
        pairs: them, matched with the network's layers; empty when the gate does not know these.
        interface: what callers of the file rely on.
        folds: the exporter's own folded tensors, by layer and tensor name, where it folds.
        checks: what the checks found, by name.
    """

    proto: onnx.ModelProto
    chain: Chain
    pairs: list[Pair]
    interface: Interface
    folds: dict[str, dict[str, np.ndarray]]
    checks: dict[str, Check]

    def failed(self, name: str) -> bool:
        """Whether a check failed."""
        return name in self.checks and self.checks[name].status == "failed"


def diagnose(findings: Findings) -> list[Diagnosis]:
    """Name the mistakes that would explain the failed checks; one of each kind."""
    if not any(check.status == "failed" for check in findings.checks.values()):
        return []
    named: dict[str, Diagnosis] = {}
    with np.errstate(all="ignore"):
        for rule in RULES:
            try:
                for diagnosis in rule(findings):
                    named.setdefault(diagnosis.id, diagnosis)
            except Exception as error:  # noqa: BLE001 - the verdict stands, whatever its reason
                text = f"{rule.__name__} itself failed: {type(error).__name__}: {error}"
                named.setdefault("undiagnosed", Diagnosis("undiagnosed", text))
    return list(named.values())


def _file(findings: Findings) -> Iterator[Diagnosis]:
    tensors = [part for part in parts(findings.proto) if isinstance(part, onnx.TensorProto)]
    if outside := [t.name for t in tensors if t.data_location == t.EXTERNAL or t.external_data]:
        text = f"weights lie in another file: {', '.join(outside)}"
        yield Diagnosis("external-data", text)
    inputs = [value.name for value in findings.proto.graph.input]
    if len(set(inputs)) < len(inputs):
        yield Diagnosis("corrupt-file", "two ONNX files, one after the other")
    for problem in (*findings.checks["structure"].problems, *findings.checks["file"].problems):
        if (
            problem.startswith("opset")
            or "ir_version" in problem
            or "operators of nothing" in problem
        ):
            yield Diagnosis("opset", problem)
    versions = [item.domain or "ai.onnx" for item in findings.proto.opset_import]
    if versions.count("ai.onnx") > 1:
        yield Diagnosis("opset", "more than one version of ONNX's operators is declared")


def _modes(findings: Findings) -> Iterator[Diagnosis]:
    for node in findings.proto.graph.node:
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        outputs = len([name for name in node.output if name])
        if node.op_type == "BatchNormalization" and (training or outputs > 1):
            text = "exported in training mode: batch norm normalizes by the batch it is served"
            yield Diagnosis("training-mode", text)
    if any(step.operator == "Dropout" for step in findings.chain.steps):
        yield Diagnosis("active-dropout", "Dropout is in training mode: it drops units at random")
    if found := _all_operators(findings.proto) & RANDOM:
        yield Diagnosis("random", f"computes with random numbers: {', '.join(sorted(found))}")


def _all_operators(proto: onnx.ModelProto) -> set[str]:
    return {part.op_type for part in parts(proto) if isinstance(part, onnx.NodeProto)}


def _precision(findings: Findings) -> Iterator[Diagnosis]:
    operators = _all_operators(findings.proto)
    if found := {o for o in operators if o in QUANTIZED or o.startswith("QLinear")}:
        yield Diagnosis("quantized", f"computes with integers: {', '.join(sorted(found))}")
    kinds = {part.data_type for part in parts(findings.proto) if isinstance(part, onnx.TensorProto)}
    for kind, name in HALVES.items():
        if kind in kinds:
            yield Diagnosis(name, f"holds weights in {name}")


def _casts(findings: Findings) -> Iterator[Diagnosis]:
    nodes = [node for node in findings.proto.graph.node if node.op_type == "Cast"]
    kinds = {a.i for node in nodes for a in node.attribute if a.name == "to"}
    for kind, name in HALVES.items():
        if kind in kinds:
            yield Diagnosis(name, f"computes in {name}")


def _batch(findings: Findings) -> Iterator[Diagnosis]:
    graph = findings.proto.graph
    inside = [value for value in graph.value_info if value.name in findings.chain.values]
    ends = {"input": findings.interface.input_shape, "output": findings.interface.output_shape}
    own = [
        value
        for kind, shape in ends.items()
        for value in getattr(graph, kind)[:1]
        if _inner_shape(value) == shape
    ]
    for value in (*own, *inside):
        axis = batch_axis(value)
        if isinstance(axis, int):
            yield Diagnosis("frozen-batch", f"batch axis fixed at {axis} ({value.name})")
    for step in findings.chain.steps:
        shape = step.tensors.get("1")
        if step.operator == "Reshape" and shape is not None and shape.size and shape.flat[0] > 1:
            text = f"batch axis fixed at {shape.flat[0]} inside ({step.where})"
            yield Diagnosis("frozen-batch", text)


def _inner_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])


def _interface(findings: Findings) -> Iterator[Diagnosis]:
    graph, wanted = findings.proto.graph, findings.interface
    steps = findings.chain.steps
    if len(graph.output) == 1 and any(step.operator in CHOICES for step in steps):
        yield Diagnosis("argmax-output", "the graph ends in the class, not in logits")
    if findings.pairs and findings.pairs[-1].layer and findings.pairs[-1].step is None:
        text = f"the output is not that of {findings.pairs[-1].layer.name}, the last layer"
        yield Diagnosis("wiring", text)
    for kind, values, name, shape in (
        ("input", graph.input, wanted.input_name, wanted.input_shape),
        ("output", graph.output, wanted.output_name, wanted.output_shape),
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
            yield Diagnosis("interface", f"{kind} {names[0]} is not [batch, {_times(shape)}]")


def _times(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _coupled(findings: Findings) -> Iterator[Diagnosis]:
    check = findings.checks.get("invariance")
    if check is not None and check.evidence.get("rows_coupled"):
        yield Diagnosis("coupled-rows", "rows of one batch affect each other")


def _foreign(findings: Findings) -> Iterator[Diagnosis]:
    nodes = [node for node in findings.proto.graph.node if node.domain not in {"", "ai.onnx"}]
    if nodes:
        names = ", ".join(sorted({f"{node.domain}.{node.op_type}" for node in nodes}))
        text = f"operators that are not ONNX's own: {names}"
        yield Diagnosis("hidden-content", text)


def _additional(findings: Findings) -> Iterator[Diagnosis]:
    """Name operators before the first layer and after the last."""
    steps, pairs = findings.chain.steps, findings.pairs
    own = [steps.index(pair.step) for pair in pairs if pair.layer and pair.step]
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
    return ", ".join(map(_operator, steps)) or "nothing"


def _operator(step: Step) -> str:
    return step.operator


def _replaced(findings: Findings) -> Iterator[Diagnosis]:
    """Name layers in whose place the file has another operator."""
    for pair in findings.pairs:
        if pair.layer is None or pair.step is None:
            continue
        expected = expected_step(pair.layer.module)[0]
        text = f"{pair.layer.name} is {pair.step.operator}, not {expected}"
        if pair.step.operator == expected:
            if expected in ACTIVATIONS and _attributes_differ(pair):
                yield Diagnosis("activation", f"{pair.layer.name} has {pair.step.attributes}")
        elif {expected, pair.step.operator} <= ACTIVATIONS:
            yield Diagnosis("activation", text)
        elif pair.step.operator in NORMALIZATIONS:
            yield Diagnosis("batch-norm-missing", text)
        else:
            yield Diagnosis("wiring", text)


def _order(findings: Findings) -> Iterator[Diagnosis]:
    """Name layers that are missing, additional or moved."""
    pairs = findings.pairs
    missing = [p.layer for p in pairs if p.layer and p.step is None and not p.folded]
    added = [p.step for p in pairs if p.step and p.layer is None]
    lost, gained = {OPERATORS[type(layer.module)] for layer in missing}, set(map(_operator, added))
    if (lost | gained) & {"Linear", "Conv"}:
        yield Diagnosis("wiring", "a layer is skipped or repeated")
    if found := gained & NORMALIZATIONS:
        yield Diagnosis("batch-norm-missing", f"{', '.join(found)} in batch norm's place")
    if not lost & gained:
        names = ", ".join(layer.name for layer in missing) or "nothing"
        if "BatchNormalization" in lost:
            yield Diagnosis("batch-norm-missing", f"missing: {names}")
        if (lost | gained) & ACTIVATIONS:
            yield Diagnosis("activation", f"missing: {names}; additional: {_names(added)}")
    if missing or added:
        gone = ", ".join(layer.name for layer in missing) or "nothing"
        text = f"wired otherwise: missing {gone}, additional {_names(added)}"
        yield Diagnosis("wiring", text)
    elif astray := [problem for problem in findings.chain.problems if " reads " in problem]:
        yield Diagnosis("wiring", "; ".join(astray[:2]))


def _attributes_differ(pair: Pair) -> bool:
    assert pair.layer is not None
    assert pair.step is not None
    return any(
        np.float32(pair.step.attributes.get(key, np.nan)) != np.float32(value)
        for key, value in expected_step(pair.layer.module)[1].items()
    )


def _attributes(findings: Findings) -> Iterator[Diagnosis]:
    for pair in findings.pairs:
        if pair.layer is None or pair.step is None:
            continue
        got, expected = pair.step.attributes, expected_step(pair.layer.module)[1]
        if isinstance(pair.layer.module, nn.BatchNorm1d | nn.BatchNorm2d):
            for key in ("epsilon", "momentum"):
                if np.float32(got.get(key, np.nan)) != np.float32(expected[key]):
                    shown = f"{key} {got.get(key):g}, the checkpoint has {expected[key]:g}"
                    yield Diagnosis(key, f"{pair.layer.name} has BN {shown}")
        elif pair.step.operator == "Linear" and got != expected:
            given = {key: got.get(key) for key in got if got.get(key) != expected.get(key)}
            yield Diagnosis("gemm-attributes", f"{pair.layer.name} has {given}")
        elif pair.step.operator in {"Conv", "MaxPool", "AveragePool"} and got != expected:
            given = {key: got.get(key) for key in got if got.get(key) != expected.get(key)}
            yield Diagnosis("wiring", f"{pair.layer.name} has {given}")


def _numbers(findings: Findings) -> Iterator[Diagnosis]:
    """Name what happened to the numbers of the layers that the file has."""
    layers = fused(findings.pairs)
    for problem in findings.checks["weights"].problems:
        if problem.startswith("the checkpoint's own"):
            yield Diagnosis("not-finite", problem)
    changed = _changed(findings)
    by_layer: dict[str, list[Changed]] = {}
    for tensor in changed:
        by_layer.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    count = sum(int(tensor.where.sum()) for tensor in changed)
    total = sum(len(tensors_of(part.layer)) for part in layers)
    surest = list(numbers.explain_changed(changed, total)) if changed else []
    for tensor in changed:
        turned = tensor.got.ndim == 2 and numbers.equal(tensor.got, tensor.right.T)
        if turned and any(numbers.equal(a, tensor.right) for a in findings.chain.stored.values()):
            yield Diagnosis("gemm-attributes", f"transB is wrong for {tensor.name}")
    sure = SURE | ({"few-weights"} if count <= 4 else set())
    yield from (d for d in surest if d.id in sure)
    linear = [t for t in changed if t.got.ndim > 1]
    norms = [part for part in layers if _is_norm(part.layer.module)]
    network_norms = [p.layer for p in findings.pairs if p.layer and _is_norm(p.layer.module)]
    for part in layers:
        if part.layer.name not in by_layer or count == 1:
            continue
        if _is_norm(part.layer.module):
            yield from numbers.explain_kept(part, layers)
        elif part.batch_norm is not None:
            yield from numbers.explain_fold(part, network_norms)
    for part in layers:
        after = next((p for p in norms if _follows(findings, part.layer, p.layer)), None)
        if after is not None and part.layer.name in by_layer and _holds_fold(findings, part):
            text = f"{after.layer.name} is both folded into {part.layer.name} and kept"
            yield Diagnosis("double-batch-norm", text)
    if not linear and count > 1:
        yield from numbers.explain_moved(norms)
    yield from surest


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)


def _follows(findings: Findings, first: object, second: object) -> bool:
    layers = [pair.layer for pair in findings.pairs if pair.layer is not None]
    return any(a is first and b is second for a, b in pairwise(layers))


def _holds_fold(findings: Findings, part: Fused) -> bool:
    fold = findings.folds.get(part.layer.name, {}).get("weight")
    weight = part.step.tensors.get("weight")
    return (
        part.batch_norm is None
        and fold is not None
        and weight is not None
        and weight.shape == fold.shape
        and bool(np.allclose(weight, fold, rtol=1e-5, atol=0))
        and not np.array_equal(weight, tensors_of(part.layer)["weight"])
    )


def _changed(findings: Findings) -> list[Changed]:
    layers = fused(findings.pairs)
    changed = []
    for part in layers:
        for stored in stored_tensors(part):
            right = stored.exact.astype(np.float32)
            if stored.limit is not None:
                fold = findings.folds.get(part.layer.name, {})
                right = fold.get(stored.name.rpartition(".")[2], right)
            if not stored.readable or stored.array is None:
                continue
            if (bits(stored.array) != bits(right)).any():
                last = part is layers[-1]
                changed.append(Changed(stored.name, stored.array, right, last))
    return changed


def _shapes(findings: Findings) -> Iterator[Diagnosis]:
    for part in fused(findings.pairs):
        for stored in stored_tensors(part):
            if stored.array is None:
                if stored.name.endswith("bias"):
                    yield Diagnosis("missing-bias", f"{stored.name} is not in the file")
            elif stored.array.shape != stored.exact.shape:
                text = f"{stored.name} is {stored.array.shape}, not {stored.exact.shape}"
                turned = stored.array.shape == stored.exact.shape[::-1] and stored.array.ndim > 1
                yield Diagnosis("transposed-weight" if turned else "other-run", text)


def _origin(findings: Findings) -> Iterator[Diagnosis]:
    if findings.failed("provenance"):
        yield Diagnosis("other-checkpoint", findings.checks["provenance"].detail)


def _hidden(findings: Findings) -> Iterator[Diagnosis]:
    texts = [*findings.checks["file"].problems, *findings.checks["structure"].problems]
    signs = ("which no check reads", "not used", "not ONNX's", "imports operators")
    for text in texts:
        if any(sign in text for sign in signs):
            yield Diagnosis("hidden-content", text)


def _broken(findings: Findings) -> Iterator[Diagnosis]:
    for problem in findings.checks["file"].problems:
        if "fields that are not ONNX's" in problem:
            yield Diagnosis("hidden-content", problem)
        elif not problem.startswith("weights outside"):
            yield Diagnosis("corrupt-file", problem)


RULES = (
    _file,
    _modes,
    _precision,
    _batch,
    _interface,
    _broken,
    _origin,
    _coupled,
    _foreign,
    _additional,
    _casts,
    _replaced,
    _order,
    _attributes,
    _numbers,
    _shapes,
    _hidden,
)
