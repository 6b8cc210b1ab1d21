"""Check ``weights``: the file's numbers are the checkpoint's, up to roundoff where folded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.parity.layers import BatchNorm, Layer
from mnist_batchnorm.parity.operators import Array, Step
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.structure import Pair

ROUNDOFF = 2.0**-24  # unit roundoff u of float32
FOLD_LIMIT = 8  # in u of the terms of `fold`: a correct fold rounds a handful of times


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file with its expected value.

    Attributes:
        name: name in the checkpoint: ``linear1.weight``.
        array: the file's tensor; None if it is missing.
        exact: the checkpoint's float32 tensor, or the exact fold in float64.
        limit: allowed distance of each element from ``exact``; None: bit for bit.
    """

    name: str
    array: Array | None
    exact: Array
    limit: Array | None = None

    @property
    def readable(self) -> bool:
        """Whether the file's tensor has the expected type and shape."""
        return (
            self.array is not None
            and self.array.dtype == np.float32
            and self.array.shape == self.exact.shape
        )


@dataclass(frozen=True)
class WeightedLayer:
    """A layer with weights, the step that computes it, and the batch norm folded into it."""

    layer: Layer
    step: Step
    batch_norm: Layer | None


def weighted_layers(pairs: list[Pair]) -> list[WeightedLayer]:
    """Return the layers with weights in the file, each with the batch norm folded into it."""
    return [
        WeightedLayer(
            pair.layer, pair.step, after.layer if after is not None and after.folded else None
        )
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


def stored_tensors(part: WeightedLayer) -> Iterator[StoredTensor]:
    """Pair each tensor of a step with its expected value from the checkpoint."""
    prefix, module = part.layer.name, part.layer.module
    own = affine(part.layer) if isinstance(module, BatchNorm) else tensors_of(part.layer)
    if part.batch_norm is None:
        for name in sorted(own.keys() | part.step.tensors.keys()):
            array = part.step.tensors.get(name)
            exact = own.get(name)
            if exact is None:  # the layer has no bias, so the file's must be zero
                exact = np.zeros(part.layer.shape[:1], np.float32)
            yield StoredTensor(f"{prefix}.{name}", array, exact)
        return
    batch_norm = part.batch_norm.module
    assert isinstance(batch_norm, BatchNorm)
    folds = fold(own, affine(part.batch_norm), batch_norm.eps)
    for name, (exact, limit) in zip(("weight", "bias"), folds, strict=True):
        yield StoredTensor(f"{prefix}.{name}", part.step.tensors.get(name), exact, limit)


def check_weights(pairs: list[Pair]) -> Check:
    """Compare every stored number with the checkpoint.

    Numbers must be equal bit for bit or, if batch norm is folded into the layer, within the limit
    of `fold`. Tensors are found through the nodes that read them, not by name: the exporter folds
    under the same names.
    """
    stored = [tensor for part in weighted_layers(pairs) for tensor in stored_tensors(part)]
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


def _judge(tensor: StoredTensor) -> tuple[dict[str, Any], list[str]]:
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
    """Return float32 numbers as their bit patterns: -0.0 is not 0.0, NaN equals itself."""
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def affine(batch_norm: Layer) -> dict[str, Array]:
    """Return batch norm's four tensors; gamma is 1 and beta 0 if it is not affine."""
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
        linear: ``weight`` float32 ``[out, ...]`` and optionally ``bias`` ``[out]``.
        batch_norm: the tensors of `affine`, float32 ``[out]`` each.
        eps: added to the variance.

    Returns:
        ``(W', limit), (b', limit)``: float64, with the allowed distance of a float32 fold:
        8 u |W'| and 8 u (|s| (|b| + |mean|) + |beta|), sums that cannot cancel.
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
