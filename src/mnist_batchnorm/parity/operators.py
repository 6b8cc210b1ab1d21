"""ONNX operators in one canonical spelling: attributes with defaults, tensors by their role.

`to_step` turns Gemm and MatMul into Linear, a flattening Reshape into Flatten, the mean over both
image axes into GlobalAveragePool; `join_bias` joins MatMul and Add.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Attributes = dict[str, Any]
Tensors = dict[str, Array]
Rule = Callable[[Attributes, Tensors], tuple[str, Attributes, Tensors]]

BATCH = -(2**40)  # placeholder for the batch size in a shape that the graph computes
# Defaults of absent attributes: https://onnx.ai/onnx/operators/
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
    """One operator of a chain.

    Attributes:
        operator: ONNX's name, but ``Linear`` for Gemm and MatMul.
        where: the node, for messages.
        attributes: all attributes, including defaults.
        tensors: constant inputs by role or index; of a Linear ``weight`` ``[out, in]``, ``bias``.
    """

    operator: str
    where: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)


def to_step(operator: str, where: str, attributes: Attributes, constants: Tensors) -> Step | str:
    """Return a node in canonical spelling, or a message why it has none."""
    rule = RULES.get(operator)
    if rule is None:
        return Step(operator, where, attributes, constants)
    try:
        name, attributes, tensors = rule(dict(attributes), constants)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"has an unexpected attribute or tensor: {type(error).__name__} {error}"
    return Step(name, where, attributes, tensors)


def _gemm(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    turned = {0: constants["1"].T, 1: constants["1"]}[attributes.pop("transB")]
    return "Linear", attributes, {"weight": np.ascontiguousarray(turned)} | _bias(constants)


def _matmul(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    neutral = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return "Linear", attributes | neutral, {"weight": np.ascontiguousarray(constants["1"].T)}


def _conv(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    kernel = list(constants["1"].shape[2:])
    defaults = sorted({"kernel_shape": kernel, **_window(len(kernel))}.items())
    return "Conv", dict(defaults) | attributes, {"weight": constants["1"]} | _bias(constants)


def _window(axes: int) -> Attributes:
    return {"dilations": [1] * axes, "pads": [0] * 2 * axes, "strides": [1] * axes}


def _bias(constants: Tensors) -> Tensors:
    return {"bias": constants["2"]} if "2" in constants else {}


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


def _pool(name: str) -> Rule:
    def rule(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
        return name, _window(len(attributes["kernel_shape"])) | attributes, constants

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
    # a flattening keeps the batch axis and joins all others
    shape = constants["1"].tolist()
    batch = {BATCH, -1} if attributes.get("allowzero") else {BATCH, -1, 0}
    if len(shape) == 2 and shape[0] in batch and shape != [-1, -1] and shape[1] != 0:
        return "Flatten", {"features": shape[1]}, {}
    return "Reshape", attributes, constants


def _dropout(attributes: Attributes, constants: Tensors) -> tuple[str, Attributes, Tensors]:
    training = bool(constants["2"]) if "2" in constants else False
    return "Dropout", attributes | {"training_mode": int(training)}, constants


RULES: dict[str, Rule] = {
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


def join_bias(steps: list[Step]) -> list[Step]:
    """Join each MatMul with the Add of its bias."""
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
