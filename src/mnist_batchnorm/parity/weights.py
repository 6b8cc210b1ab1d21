"""Are the numbers in the file the checkpoint's: bit for bit, or to roundoff where folded?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.structure import expected_operators, type_name

Array = npt.NDArray[Any]

ROUNDOFF = 2.0**-24  # unit roundoff u of float32
FOLD_LIMIT = 8  # in u of what `fold` adds up: an honest fold rounds a handful of times
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # inputs 1 to 4 of the node


@dataclass(frozen=True)
class Expected:
    """What one stored tensor must be.

    Attributes:
        name: in the checkpoint.
        tensor: name in the file, found through the node that reads it.
        value: float32 when it must be equal bit for bit, float64 when it is the exact fold.
        limit: how far each element may lie from ``value``; None for bit for bit.
    """

    name: str
    tensor: str
    value: Array
    limit: Array | None = None


def check_weights(proto: onnx.ModelProto, checkpoint: Checkpoint, folded: bool) -> Check:
    """Compare every stored number with the checkpoint.

    Where the graph keeps BatchNormalization, every weight, bias and running statistic must equal
    the checkpoint's bit for bit. Where it is folded, each must lie within the rounding that `fold`
    allows: 8 u of a weight's own size, 8 u of the size of the terms that make a bias. Tensors are
    found through the nodes that read them, not by name: the exporter folds under the same names.

    Args:
        proto: the ONNX model; `file_problems` finds none.
        checkpoint: what it should hold.
        folded: whether batch norm must be folded into the Gemm before, or must have been kept.
    """
    network = checkpoint.architecture
    folded = folded and network.batch_norm
    operators = [operator for operator, _ in expected_operators(network, folded)]
    if [node.op_type for node in proto.graph.node] != operators:
        return Check("weights", False, "cannot be matched: the operators are not the network's")

    state = {name: tensor.numpy() for name, tensor in checkpoint.state.items()}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    expectations = list(_expectations(proto, state, network.bn_eps, folded))
    problems: list[str] = []
    worst: dict[str, Any] = {"fraction_of_limit": 0.0}
    for expected in expectations:
        if expected.tensor not in stored:
            problems.append(f"{expected.name}: {expected.tensor!r} is not stored in the file")
            continue
        array = _read(stored[expected.tensor], expected.value.shape)
        if isinstance(array, str):
            problems.append(f"{expected.name} {array}")
        elif expected.limit is None:
            problems += _bit_problems(expected, array)
        else:
            evidence, problem = _fold_evidence(expected, array)
            worst = max(worst, evidence, key=lambda e: e["fraction_of_limit"])
            problems += problem
    unused = sorted(stored.keys() - {expected.tensor for expected in expectations})
    if unused:
        problems.append(f"stored but not the network's: {', '.join(unused)}")
    count = sum(expected.value.size for expected in expectations)
    how = "within the rounding of the float64 fold" if folded else "equal, bit for bit"
    return verdict(
        "weights",
        problems,
        f"{count:,} numbers in {len(expectations)} tensors {how}",
        {"numbers": count, "folded": folded} | ({"worst": worst} if folded else {}),
    )


def _read(tensor: onnx.TensorProto, shape: tuple[int, ...]) -> Array | str:
    """Return the float32 array that a tensor holds, or what is wrong with it."""
    if tensor.data_type != onnx.TensorProto.FLOAT or tuple(tensor.dims) != shape:
        got = f"{type_name(tensor.data_type)} {tuple(tensor.dims)}"
        return f"is {got}, expected FLOAT {shape}"
    try:
        array: Array = numpy_helper.to_array(tensor)
    except ValueError as error:  # too few or too many bytes, or only a segment
        return f"cannot be read: {error}"
    return array


def _bit_problems(expected: Expected, array: Array) -> list[str]:
    different = array.view(np.uint32) != expected.value.view(np.uint32)
    if not different.any():
        return []
    gap = np.where(different, np.abs(array.astype(np.float64) - expected.value), -1)
    at = np.unravel_index(np.argmax(gap), gap.shape)
    return [
        f"{expected.name}: {int(different.sum()):,} of {array.size:,} numbers differ, most at "
        f"{[*map(int, at)]}: {array[at]:.9g}, the checkpoint has {expected.value[at]:.9g}"
    ]


def _fold_evidence(expected: Expected, array: Array) -> tuple[dict[str, Any], list[str]]:
    gap = finite(np.abs(array.astype(np.float64) - expected.value) / expected.limit)
    at = np.unravel_index(np.argmax(gap), gap.shape)
    where = [*map(int, at)]
    evidence = {"fraction_of_limit": float(gap[at]), "tensor": expected.name, "index": where}
    if gap[at] <= 1:
        return evidence, []
    return evidence, [
        f"{expected.name}{where} is {array[at]:.9g}, the fold gives {expected.value[at]:.9g}: "
        f"{gap[at]:.3g} times the allowed rounding ({int((gap > 1).sum()):,} numbers beyond it)"
    ]


def _expectations(
    proto: onnx.ModelProto, state: Mapping[str, Array], eps: float, folded: bool
) -> Iterator[Expected]:
    layer = 0
    for node in proto.graph.node:
        if node.op_type == "Gemm":
            layer += 1
            names = (f"linear{layer}.weight", f"linear{layer}.bias")
            tensors = _padded(node.input[1:], 2)
            if folded and f"bn{layer}.weight" in state:
                folds = fold(state, layer, eps)
                for name, tensor, (value, limit) in zip(names, tensors, folds, strict=True):
                    yield Expected(name, tensor, value, limit)
            else:
                for name, tensor in zip(names, tensors, strict=True):
                    yield Expected(name, tensor, state[name])
        elif node.op_type == "BatchNormalization":
            for key, tensor in zip(STATISTICS, _padded(node.input[1:], 4), strict=True):
                yield Expected(f"bn{layer}.{key}", tensor, state[f"bn{layer}.{key}"])


def _padded(names: Sequence[str], length: int) -> list[str]:
    return [*names, *[""] * length][:length]  # trailing optional inputs may be absent


def fold(state: Mapping[str, Array], layer: int, eps: float) -> tuple[tuple[Array, Array], ...]:
    """Fold batch norm into the linear layer before it, in float64.

    With s = gamma / sqrt(var + eps): W' = s W and b' = s (b - mean) + beta (Jacob et al. 2018,
    "Quantization and Training of Neural Networks ...", section 3.2).

    Returns:
        ``(W', limit), (b', limit)``: float64, and how far a float32 fold may honestly lie from
        each: 8 u |W'| and 8 u (|s| (|b| + |mean|) + |beta|), sums that cannot cancel.
    """
    gamma, beta, mean, variance = (
        state[f"bn{layer}.{key}"].astype(np.float64) for key in STATISTICS
    )
    weight = state[f"linear{layer}.weight"].astype(np.float64)
    bias = state[f"linear{layer}.bias"].astype(np.float64)
    scale = gamma / np.sqrt(variance + eps)
    folded_weight = scale[:, None] * weight
    folded_bias = scale * (bias - mean) + beta
    bias_size = np.abs(scale) * (np.abs(bias) + np.abs(mean)) + np.abs(beta)
    tiny = float(np.finfo(np.float32).smallest_subnormal)  # spacing of the numbers near zero
    return (
        (folded_weight, FOLD_LIMIT * ROUNDOFF * np.abs(folded_weight) + tiny),
        (folded_bias, FOLD_LIMIT * ROUNDOFF * bias_size + tiny),
    )
