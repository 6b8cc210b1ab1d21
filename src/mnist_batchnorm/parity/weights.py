"""Are the numbers in the file the checkpoint's: bit for bit, or to roundoff where folded?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mnist_batchnorm.parity.graph import Step
from mnist_batchnorm.parity.layers import Layer
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.structure import Pair

Array = npt.NDArray[Any]

ROUNDOFF = 2.0**-24  # unit roundoff u of float32
FOLD_LIMIT = 8  # in u of what `fold` adds up: an honest fold rounds a handful of times


@dataclass(frozen=True)
class Stored:
    """One tensor of the file and what it must be.

    Attributes:
        name: in the checkpoint: ``linear1.weight``.
        array: as the file has it; None when it has none.
        exact: float32 of the checkpoint; float64 where it is the exact fold.
        limit: how far each element may lie from ``exact``; None for bit for bit.
    """

    name: str
    array: Array | None
    exact: Array
    limit: Array | None = None

    @property
    def readable(self) -> bool:
        """Whether the file's tensor can be compared number by number."""
        return (
            self.array is not None
            and self.array.dtype == np.float32
            and self.array.shape == self.exact.shape
        )


@dataclass(frozen=True)
class Fused:
    """A layer with weights, the step that computes it, and the batch norm folded into it."""

    layer: Layer
    step: Step
    batch_norm: Layer | None


def fused(pairs: list[Pair]) -> list[Fused]:
    """List the layers with weights that the file has, each with the batch norm it must hold."""
    return [
        Fused(pair.layer, pair.step, after.layer if after is not None and after.folded else None)
        for pair, after in zip_longest(pairs, pairs[1:])
        if pair.layer is not None
        and pair.step is not None
        and tensors_of(pair.layer)
        and pair.step.tensors.keys() <= {"weight", "bias", "running_mean", "running_var"}
    ]


def tensors_of(layer: Layer) -> dict[str, Array]:
    """Return a layer's parameters and running statistics as float32 arrays."""
    return {
        name: tensor.numpy()
        for name, tensor in layer.module.state_dict().items()
        if name != "num_batches_tracked"
    }


def stored_tensors(part: Fused) -> Iterator[Stored]:
    """Pair each tensor of a step with what the checkpoint says it must be."""
    prefix, module = part.layer.name, part.layer.module
    norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    own = affine(part.layer) if norm else tensors_of(part.layer)
    if part.batch_norm is None:
        for name in sorted(own.keys() | part.step.tensors.keys()):
            array = part.step.tensors.get(name)
            exact = own.get(name)
            if exact is None:  # a bias that the layer has not: it must add nothing
                exact = np.zeros(part.layer.shape[:1], np.float32)
            yield Stored(f"{prefix}.{name}", array, exact)
        return
    batch_norm = part.batch_norm.module
    assert isinstance(batch_norm, nn.BatchNorm1d | nn.BatchNorm2d)
    folds = fold(own, affine(part.batch_norm), batch_norm.eps)
    for name, (exact, limit) in zip(("weight", "bias"), folds, strict=True):
        yield Stored(f"{prefix}.{name}", part.step.tensors.get(name), exact, limit)


def check_weights(pairs: list[Pair]) -> Check:
    """Compare every stored number with the checkpoint.

    Where the graph keeps BatchNormalization, every weight, bias and running statistic must equal
    the checkpoint's bit for bit. Where it is folded, each must lie within the rounding that `fold`
    allows: 8 u of a weight's own size, 8 u of the size of the terms that make a bias. Tensors are
    found through the nodes that read them, not by name: the exporter folds under the same names.

    Args:
        pairs: the network's layers and the file's steps.
    """
    stored = [tensor for part in fused(pairs) for tensor in stored_tensors(part)]
    expected = [pair.layer for pair in pairs if pair.layer and tensors_of(pair.layer)]
    problems = [
        f"{layer.name} has no place in the file"
        for layer in expected
        if not any(pair.layer is layer and (pair.step or pair.folded) for pair in pairs)
    ]
    problems += [problem for layer in expected for problem in _impossible(layer)]
    worst: dict[str, Any] = {"fraction_of_limit": 0.0}
    for tensor in stored:
        evidence, trouble = _judge(tensor)
        problems += trouble
        worst = max(worst, evidence, key=lambda e: e["fraction_of_limit"])
    statistics = sum(
        array.size
        for layer in expected
        for name, array in tensors_of(layer).items()
        if name.startswith("running_")
    )
    numbers = sum(tensor.exact.size for tensor in stored)
    folded = sum(tensor.exact.size for tensor in stored if tensor.limit is not None)
    how = [
        f"{numbers - folded:,} numbers equal, bit for bit" * (folded < numbers),
        f"{folded:,} within {worst['fraction_of_limit']:.2g} of the rounding that folding allows"
        * (folded > 0),
        "no running statistics: the network has no batch norm" * (not statistics),
    ]
    return verdict(
        "weights",
        problems,
        "; ".join(filter(None, how)) if numbers else "the network has no weights",
        {"numbers": numbers, "folded_numbers": folded, "running_statistics": statistics}
        | ({"worst": worst} if folded else {}),
    )


def _impossible(layer: Layer) -> list[str]:
    own = tensors_of(layer)
    broken = [name for name, array in own.items() if not np.isfinite(array).all()]
    if "running_var" in own and (own["running_var"] < 0).any():
        broken.append("running_var")
    return [f"the checkpoint's own {layer.name}.{name} is not possible" for name in broken]


def _judge(tensor: Stored) -> tuple[dict[str, Any], list[str]]:
    nothing = {"fraction_of_limit": 0.0}
    if tensor.array is None:
        if tensor.limit is None or np.any(np.abs(tensor.exact) > tensor.limit):
            return nothing, [f"{tensor.name} is not in the file"]
        return nothing, []
    if not tensor.readable:
        got = f"{tensor.array.dtype} {tensor.array.shape}"
        return nothing, [f"{tensor.name} is {got}, expected float32 {tensor.exact.shape}"]
    if tensor.limit is None:
        return nothing, _bit_problems(tensor.name, tensor.array, tensor.exact)
    gap = np.abs(tensor.array.astype(np.float64) - tensor.exact)
    share = finite(np.divide(gap, tensor.limit, out=np.zeros_like(gap), where=gap > 0))
    at = np.unravel_index(np.argmax(share), share.shape)
    where = [*map(int, at)]
    evidence = {"fraction_of_limit": float(share[at]), "tensor": tensor.name, "index": where}
    if share[at] <= 1:
        return evidence, []
    return evidence, [
        f"{tensor.name}{where} is {tensor.array[at]:.9g}, the fold gives {tensor.exact[at]:.9g}: "
        f"{share[at]:.3g} times the allowed rounding ({int((share > 1).sum()):,} numbers beyond it)"
    ]


def _bit_problems(name: str, array: Array, exact: Array) -> list[str]:
    different = bits(array) != bits(exact)
    if not different.any():
        return []
    gap = np.where(different, np.abs(array.astype(np.float64) - exact), -1)
    at = np.unravel_index(np.argmax(gap), gap.shape)
    return [
        f"{name}: {int(different.sum()):,} of {array.size:,} numbers differ, most at "
        f"{[*map(int, at)]}: {array[at]:.9g}, the checkpoint has {exact[at]:.9g}"
    ]


def bits(array: Array) -> npt.NDArray[np.uint32]:
    """Return float32 numbers as the integers that hold them: -0.0 is not 0.0, NaN equals itself."""
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def affine(batch_norm: Layer) -> dict[str, Array]:
    """Return batch norm's four tensors; without ``affine`` gamma is 1 and beta 0."""
    own = tensors_of(batch_norm)
    ones = np.ones_like(own["running_var"])
    return {"weight": ones, "bias": 0 * ones} | own


def fold(
    linear: Mapping[str, Array], batch_norm: Mapping[str, Array], eps: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Fold batch norm into the linear layer or convolution before it, in float64.

    With s = gamma / sqrt(var + eps): W' = s W and b' = s (b - mean) + beta (Jacob et al. 2018,
    "Quantization and Training of Neural Networks ...", section 3.2).

    Args:
        linear: ``weight`` float32 ``[out, ...]`` and, unless it has none, ``bias`` ``[out]``.
        batch_norm: `affine`, float32 ``[out]`` each.
        eps: added to the variance.

    Returns:
        ``(W', limit), (b', limit)``: float64, and how far a float32 fold may honestly lie from
        each: 8 u |W'| and 8 u (|s| (|b| + |mean|) + |beta|), sums that cannot cancel.
    """
    gamma, beta, mean, variance = (
        batch_norm[name].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    weight = linear["weight"].astype(np.float64)
    bias = linear.get("bias", np.zeros_like(mean)).astype(np.float64)
    scale = gamma / np.sqrt(variance + eps)
    folded_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    folded_bias = scale * (bias - mean) + beta
    bias_size = np.abs(scale) * (np.abs(bias) + np.abs(mean)) + np.abs(beta)
    tiny = float(np.finfo(np.float32).smallest_subnormal)  # spacing of the numbers near zero
    return (
        (folded_weight, FOLD_LIMIT * ROUNDOFF * np.abs(folded_weight) + tiny),
        (folded_bias, FOLD_LIMIT * ROUNDOFF * bias_size + tiny),
    )
