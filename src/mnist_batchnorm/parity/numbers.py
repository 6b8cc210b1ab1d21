"""Which mistake would turn the checkpoint's numbers into those of the file?

Each rule turns the right numbers into wrong ones as a known mistake does, and compares. The rules
only name a mistake that other checks have found; they decide nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mnist_batchnorm.parity.layers import Layer
from mnist_batchnorm.parity.report import Diagnosis
from mnist_batchnorm.parity.weights import ROUNDOFF, Fused, affine, bits, tensors_of

Array = npt.NDArray[Any]

CLOSE = 2e-6  # relative: some 30 roundings
SCALE_CLOSE = 4e-7  # relative, of the factor of a whole row: some 6 roundings


@dataclass(frozen=True)
class Changed:
    """A tensor of the file that is not what it must be.

    Attributes:
        name: in the checkpoint.
        got: float32, as the file has it.
        right: float32 of the same shape.
        last: whether it belongs to the network's last layer.
    """

    name: str
    got: Array
    right: Array
    last: bool

    @property
    def where(self) -> npt.NDArray[np.bool_]:
        """Which numbers differ."""
        different: npt.NDArray[np.bool_] = bits(self.got) != bits(self.right)
        return different


def explain_kept(part: Fused, others: Sequence[Fused]) -> Iterator[Diagnosis]:
    """Name what happened to a batch norm that the file keeps.

    Args:
        part: the layer, a BatchNorm1d or 2d, and its step.
        others: all layers with weights that the file has.
    """
    norm, got, name = affine(part.layer), part.step.tensors, part.layer.name
    if not _same_shapes(got, norm):
        return
    mean, variance = norm["running_mean"], norm["running_var"]
    new_mean, new_variance = got["running_mean"], got["running_var"]
    if equal(got["weight"], norm["bias"]) and equal(got["bias"], norm["weight"]):
        yield Diagnosis("swapped-affine", f"gamma and beta of {name} are exchanged")
    if equal(new_mean, variance) and equal(new_variance, mean):
        yield Diagnosis("swapped-statistics", f"mean and variance of {name} are exchanged")
    for other in others:
        if other is not part and isinstance(other.layer.module, nn.BatchNorm1d | nn.BatchNorm2d):
            theirs = affine(other.layer)
            if any(equal(got[key], theirs[key]) for key in ("running_mean", "running_var")):
                text = f"the statistics of {name} are those of {other.layer.name}"
                yield Diagnosis("other-layer-statistics", text)
    unlike = [not equal(new_mean, mean), not equal(new_variance, variance)]
    if (unlike[0] and not new_mean.any()) or (unlike[1] and np.all(new_variance == 1)):
        text = f"the running statistics of {name} are the initial ones, mean 0 or variance 1"
        yield Diagnosis("reset-statistics", text)
    if not equal(got["weight"], norm["weight"]) and np.all(got["weight"] == 1):
        yield Diagnosis("missing-affine", f"gamma of {name} is 1")
    if not equal(got["bias"], norm["bias"]) and not got["bias"].any():
        yield Diagnosis("missing-affine", f"beta of {name} is 0")
    if unlike[1]:
        yield from _explain_variance(part, variance, new_variance)


def _explain_variance(part: Fused, variance: Array, got: Array) -> Iterator[Diagnosis]:
    name = part.layer.name
    eps = _eps(part.layer.module)
    right = variance.astype(np.float64)
    added = got.astype(np.float64) - right
    best = float(added[np.argmin(right)])  # of the unit where it shows most clearly
    noise = 2 * ROUNDOFF * right
    if best > noise.min() and (np.abs(added - best) <= noise).all():
        text = f"{best:.3g} was added to the running variance of {name}, and epsilon is added again"
        yield Diagnosis("epsilon", text)
    deviations = {
        "the standard deviation": np.sqrt(right),
        "the standard deviation, epsilon included": np.sqrt(right + eps),
        "1 over the standard deviation": 1 / np.sqrt(right + eps),
        "the variance's square": right**2,
    }
    for what, value in deviations.items():
        if _close(got, value):
            text = f"the running variance of {name} holds {what}"
            yield Diagnosis("std-for-variance", text)
    yield from _explain_factor(name, _common_factor(got, right), part.layer.module)


def _explain_factor(name: str, factor: float | None, module: nn.Module) -> Iterator[Diagnosis]:
    """Name why all variances would be one factor too large."""
    if factor is None:
        return
    n = 1 / abs(1 - factor) + (factor > 1)  # (n - 1) / n or its inverse
    if abs(factor - (1 - _momentum(module))) < CLOSE:
        text = f"the statistics of {name} equal a checkpoint one train-mode forward on zeros later"
        yield Diagnosis("moved-statistics", text)
    elif 1.5 < n < 1e5 and abs(n - round(n)) < 1e-3 * n:
        share = f"{round(n) - 1}/{round(n)}" if factor < 1 else f"{round(n)}/{round(n) - 1}"
        text = f"the running variance of {name} is {share} of the checkpoint's: the biased estimate"
        yield Diagnosis("biased-variance", text + " in place of the unbiased, or the reverse")
    else:
        text = f"the running variance of {name} is {factor:.6g} times the checkpoint's"
        yield Diagnosis("scaled-weights", text)


def explain_moved(parts: Sequence[Fused]) -> Iterator[Diagnosis]:
    """Name running statistics that moved while all that is learnt stayed.

    One forward in train mode makes (1 - m) old + m batch of each (PyTorch's momentum m): the batch
    that would explain the file must lie where batches lie.
    """
    moved, distances, ratios = [], [], []
    for part in parts:
        module, got = part.layer.module, part.step.tensors
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        norm = affine(part.layer)
        if not _same_shapes(got, norm) or any(
            not equal(got[key], norm[key]) for key in ("weight", "bias")
        ):
            return
        mean, variance = (norm[k].astype(np.float64) for k in ("running_mean", "running_var"))
        if equal(got["running_mean"], mean) and equal(got["running_var"], variance):
            continue
        m = _momentum(module)
        moved.append(part.layer.name)
        spread = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
        distances.append(np.abs(got["running_mean"] - mean) / m / spread)
        ratios.append((got["running_var"] - (1 - m) * variance) / m / (spread**2))
    if not moved:
        return
    distance, ratio = np.concatenate(distances), np.concatenate(ratios)
    names = ", ".join(moved)
    if np.isfinite(distance).all() and np.median(distance) < 1 and (ratio > 0).mean() > 0.9:
        text = (
            f"the statistics of {names} equal a checkpoint one train-mode forward later: the batch "
            f"would lie {np.median(distance):.2g} standard deviations from the running mean"
        )
    else:
        text = f"the running statistics of {names} are others: of another moment or other data"
    yield Diagnosis("moved-statistics", text)


def explain_fold(part: Fused, norms: Sequence[Layer]) -> Iterator[Diagnosis]:
    """Name the wrong formula by which batch norm was folded into a layer.

    Args:
        part: a layer that must hold ``part.batch_norm``.
        norms: every batch norm of the network.
    """
    assert part.batch_norm is not None
    own, norm = tensors_of(part.layer), affine(part.batch_norm)
    weight, bias = part.step.tensors.get("weight"), part.step.tensors.get("bias")
    name = f"{part.batch_norm.name} into {part.layer.name}"
    if weight is None or weight.shape != own["weight"].shape:
        return
    gamma, beta, mean, variance = (
        norm[key].astype(np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    eps = _eps(part.batch_norm.module)
    plain = own["weight"].astype(np.float64).reshape(len(gamma), -1)
    linear_bias = own.get("bias", np.zeros(len(gamma))).astype(np.float64)
    right = gamma / np.sqrt(variance + eps)
    rows = weight.astype(np.float64).reshape(plain.shape)
    scale = _row_scale(rows, plain)
    if scale is None:
        if plain.shape[0] == plain.shape[1] and _close(rows, plain * right[None, :]):
            yield Diagnosis("bad-fold", f"folding {name}: columns were scaled, not rows")
        return
    if _same_scale(scale, np.ones_like(scale)) and not _same_scale(right, np.ones_like(right)):
        if bias is None or _close(bias, linear_bias):
            text = f"{part.batch_norm.name} is neither kept nor folded"
            yield Diagnosis("batch-norm-missing", text)
        else:
            yield Diagnosis("bad-fold", f"folding {name} left the weights as they were")
        return
    if not _same_scale(scale, right):
        yield from _explain_other(name, scale, gamma, eps, part.batch_norm, norms)
        yield from _explain_scale(name, scale, gamma, beta, variance, mean, part.batch_norm.module)
        return
    shift = np.zeros_like(beta) if bias is None else bias.astype(np.float64)
    formulas = {
        "the bias was not folded": linear_bias,
        "the bias is missing": np.zeros_like(beta),
        "without the running mean": right * linear_bias + beta,
        "with the mean's sign turned": right * (linear_bias + mean) + beta,
        "without beta": right * (linear_bias - mean),
        "with beta's sign turned": right * (linear_bias - mean) - beta,
        "the layer's own bias is missing": beta - right * mean,
        "the layer's own bias was not scaled": linear_bias - right * mean + beta,
        "the mean was not scaled": right * linear_bias - mean + beta,
        "the bias was not scaled": linear_bias - mean + beta,
        "beta was scaled": right * (linear_bias - mean + beta),
        "only beta is left of the bias": beta,
        "the layer's own bias was added twice": right * (2 * linear_bias - mean) + beta,
        "the layer's own bias was added unscaled": linear_bias + beta - right * mean,
        "the mean was left out with the layer's own bias": right * linear_bias,
    }
    size = np.abs(right) * (np.abs(mean) + np.abs(linear_bias)) + np.abs(beta)
    if _close(shift, right * (linear_bias - mean) + beta, size):
        return
    for what, value in formulas.items():
        if _close(shift, value, size):
            yield Diagnosis("bad-fold", f"folding {name}: {what}")
            return
    if (np.abs(shift - (right * (linear_bias - mean) + beta)) > CLOSE * size).mean() > 0.9:
        yield Diagnosis("bad-fold", f"folding {name}: the bias is not the fold's")


def _explain_other(
    name: str, scale: Array, gamma: Array, eps: float, own: Layer, norms: Sequence[Layer]
) -> Iterator[Diagnosis]:
    for norm in norms:
        variance = affine(norm)["running_var"].astype(np.float64)
        if norm.name != own.name and variance.shape == gamma.shape:
            if _same_scale(scale, gamma / np.sqrt(variance + eps)):
                text = f"folded {name} with the statistics of {norm.name}"
                yield Diagnosis("other-layer-statistics", text)
            elif _same_scale(scale, affine(norm)["weight"] / np.sqrt(variance + eps)):
                yield Diagnosis("bad-fold", f"folding {name}: {norm.name} was folded instead")


def _explain_scale(
    name: str,
    scale: Array,
    gamma: Array,
    beta: Array,
    variance: Array,
    mean: Array,
    module: nn.Module,
) -> Iterator[Diagnosis]:
    eps = _eps(module)
    spread = np.sqrt(variance + eps)
    right = gamma / spread
    known = {
        "epsilon added after the square root": ("bad-fold", gamma / (np.sqrt(variance) + eps)),
        "without gamma": ("bad-fold", 1 / spread),
        "with gamma's sign lost": ("bad-fold", np.abs(right)),
        "with gamma + 1": ("bad-fold", (gamma + 1) / spread),
        "without the square root": ("bad-fold", gamma / (variance + eps)),
        "with the deviation in the variance's place": (
            "std-for-variance",
            gamma / np.sqrt(spread + eps),
        ),
        "with the inverse deviation in the variance's place": (
            "std-for-variance",
            gamma / np.sqrt(1 / spread + eps),
        ),
        "without the variance": ("bad-fold", gamma),
        "multiplied by the deviation": ("bad-fold", gamma * spread),
        "twice": ("bad-fold", right**2),
        "gamma divided out instead of in": ("bad-fold", 1 / (gamma * spread)),
        "with variance 1": ("reset-statistics", gamma / np.sqrt(1 + eps)),
        "with the mean in the variance's place": (
            "swapped-statistics",
            gamma / np.sqrt(np.abs(mean) + eps),
        ),
        "with beta in gamma's place": ("swapped-affine", beta / spread),
        "in float16": ("float16", right.astype(np.float16).astype(np.float64)),
        "in bfloat16": ("bfloat16", _mantissa(right.astype(np.float32), 16).astype(np.float64)),
        "with the neighbouring unit's": ("bad-fold", np.roll(right, 1)),
        "with the other neighbouring unit's": ("bad-fold", np.roll(right, -1)),
        "with the neighbouring unit's variance": ("bad-fold", gamma / np.roll(spread, 1)),
        "with the other neighbouring unit's variance": ("bad-fold", gamma / np.roll(spread, -1)),
        "into the units in another order": ("permuted-units", right[_order(right, scale)]),
    }
    for what, (id_, value) in known.items():
        if _same_scale(scale, value):
            yield Diagnosis(id_, f"folding {name}: {what}")
            return
    implied = (gamma / scale) ** 2  # variance + epsilon, as the file has them
    added, noise = implied - variance, 2 * SCALE_CLOSE * implied
    best = float(added[np.argmin(noise)])  # of the unit where it shows most clearly
    if (np.abs(added - best) <= noise).all() and abs(best - eps) > noise.min():
        if abs(best) <= noise.min():
            yield Diagnosis("bad-fold", f"folding {name}: without epsilon")
        text = f"folded {name} with epsilon {best:.3g}, the checkpoint has {eps:g}"
        yield Diagnosis("epsilon", text)
    yield from _explain_factor(name, _common_factor(implied - eps, variance), module)
    if _common_factor(scale, right) is None:
        gap = np.abs(scale / right - 1)
        count = int((gap > SCALE_CLOSE).sum())
        if gap.max() < 2e-3:
            text = f"folding {name}: nearly right, as by an approximate root"
            yield Diagnosis("bad-fold", text)
        elif count <= len(gap) // 4:
            yield Diagnosis("bad-fold", f"folding {name}: wrong in {count} of {len(gap)} units")
        else:
            text = f"folded {name} with other statistics than the checkpoint's in {count} units"
            yield Diagnosis("moved-statistics", text)


def _same_scale(a: Array, b: Array) -> bool:
    return bool(np.allclose(a, b, rtol=SCALE_CLOSE, atol=0))


def _order(right: Array, scale: Array) -> Array:
    order = np.empty(len(right), int)
    order[np.argsort(scale)] = np.argsort(right)
    return order


def explain_changed(tensors: Sequence[Changed], total: int) -> Iterator[Diagnosis]:
    """Name what would have changed all these tensors at once, the surest explanation first.

    Args:
        tensors: those that differ.
        total: how many the file has.
    """
    names = ", ".join(t.name for t in tensors)
    if all(equal(t.got.byteswap(), t.right) for t in tensors):
        yield Diagnosis("byte-order", f"the bytes of each number of {names} are reversed")
    broken = [t.name for t in tensors if not np.isfinite(t.got).all()]
    if broken:
        yield Diagnosis("not-finite", f"{', '.join(broken)} holds NaN or infinity")
    count = sum(int(t.where.sum()) for t in tensors)
    if count == 1:
        yield _one_number(tensors[0])
    yield from _rounded(tensors)
    yield from (found for tensor in tensors for found in _reordered(tensor))
    if 1 < count <= 4:
        yield Diagnosis("few-weights", f"{count} numbers of {names} differ")
    yield from (found for tensor in tensors for found in _zeroed(tensor))
    if len(tensors) == 2 and all(tensor.last for tensor in tensors):
        first, second = (_common_factor(tensor.got, tensor.right) for tensor in tensors)
        if first is not None and second is not None and abs(first - second) < CLOSE * abs(first):
            text = f"{names} are {first:.6g} times the checkpoint's"
            yield Diagnosis("scaled-logits", text)
    yield from (found for tensor in tensors for found in _scaled(tensor))
    if 1 < count <= 16:
        yield Diagnosis("few-weights", f"{count} numbers of {names} differ")
    yield from _everything(tensors, names, total)


def _one_number(tensor: Changed) -> Diagnosis:
    (at,) = np.argwhere(tensor.where)
    got, right = (int(bits(array)[tuple(at)]) for array in (tensor.got, tensor.right))
    place = f"{tensor.name}{at.tolist()}"
    if (got ^ right).bit_count() == 1 or abs(got - right) == 1:
        return Diagnosis("bit-flip", f"{place} differs in one bit")
    return Diagnosis("few-weights", f"{place} differs, and nothing else")


def _rounded(tensors: Sequence[Changed]) -> Iterator[Diagnosis]:
    formats: dict[str, tuple[str, Callable[[Array], Array]]] = {
        "float16": ("float16", lambda x: x.astype(np.float16).astype(np.float32)),
        "bfloat16": ("bfloat16", lambda x: _mantissa(x, 16)),
        "bfloat16, cut off": ("bfloat16", lambda x: (bits(x) & 0xFFFF0000).view(np.float32)),
        "TF32": ("tf32", lambda x: _mantissa(x, 13)),
        "TF32, halves up": ("tf32", lambda x: ((bits(x) + 0x1000) & 0xFFFFE000).view(np.float32)),
        "TF32, cut off": ("tf32", lambda x: (bits(x) & 0xFFFFE000).view(np.float32)),
    }
    names = ", ".join(t.name for t in tensors)
    with np.errstate(all="ignore"):
        for what, (id_, rounding) in formats.items():
            if all(equal(t.got, rounding(t.right)) for t in tensors):
                yield Diagnosis(id_, f"weights rounded through {what}: {names}")
                return
        for digits in range(1, 9):
            if all(_decimal(t, digits) for t in tensors):
                text = f"weights rounded to {digits} decimals: {names}"
                yield Diagnosis("rounded-decimals", text)
                return
        matrices = [t for t in tensors if t.got.ndim > 1]
        if matrices and all(_on_a_grid(t) for t in matrices):
            text = f"weights on a grid of 256 values or fewer: {names}"
            yield Diagnosis("quantized", text)


def _mantissa(array: Array, dropped: int) -> Array:
    """Round to nearest even without the last ``dropped`` bits."""
    whole = bits(array).astype(np.uint64)
    half = (np.uint64(1) << np.uint64(dropped - 1)) - np.uint64(1)
    odd = (whole >> np.uint64(dropped)) & np.uint64(1)
    kept = ((whole + half + odd) >> np.uint64(dropped)) << np.uint64(dropped)
    return kept.astype(np.uint32).view(np.float32)


def _decimal(tensor: Changed, digits: int) -> bool:
    exact = tensor.right.astype(np.float64)
    got = tensor.got.astype(np.float64)
    size = np.where(exact == 0, 1.0, np.abs(exact))
    significant = 10.0 ** (digits - 1 - np.floor(np.log10(size)))
    return any(
        bool(np.isclose(got, rounded, rtol=2 * ROUNDOFF, atol=0).all())
        for rounded in (np.round(exact, digits), np.round(exact * significant) / significant)
    )


def _on_a_grid(tensor: Changed) -> bool:
    got, right = (a.reshape(len(a), -1).astype(np.float64) for a in (tensor.got, tensor.right))
    if len(np.unique(got)) <= min(256, len(np.unique(right)) // 2):
        return True
    levels_a_row = max(len(np.unique(row)) for row in got)
    if levels_a_row <= min(256, got.shape[1] // 4):
        return True
    for axis in (None, 1):
        ends = [np.abs(got).max(axis=axis, keepdims=True)]
        low, high = (f(right, axis=axis, keepdims=True) for f in (np.min, np.max))
        for levels in (127, 7, 128, 8):
            steps = [ends[0] / levels, np.abs(right).max(axis=axis, keepdims=True) / levels]
            steps.append((np.maximum(high, 0) - np.minimum(low, 0)) / (2 * levels + levels % 2))
            for step in steps:
                index = got / np.where(step == 0, 1, step)
                on_grid = np.abs(index - np.round(index)) < 1e-3 * np.maximum(1, np.abs(index) / 8)
                if on_grid.all() and (np.abs(got - right) <= 1.01 * step).all():
                    return True
    return False


def _reordered(tensor: Changed) -> Iterator[Diagnosis]:
    got, right = tensor.got, tensor.right
    if got.ndim == 2 and got.shape == right.T.shape and equal(got, right.T):
        yield Diagnosis("transposed-weight", f"{tensor.name} is transposed")
    elif got.ndim == 2 and equal(got.ravel(), right.T.ravel()):
        yield Diagnosis("transposed-weight", f"{tensor.name} was laid out in columns")
    elif got.ndim == 4 and any(
        equal(got, turned) for turned in (right.swapaxes(2, 3), right[:, :, ::-1, ::-1])
    ):
        yield Diagnosis("transposed-weight", f"the kernels of {tensor.name} are turned")
    elif tensor.where.sum() > 1:
        for axis in range(min(got.ndim, 2)):
            if _same_slices(np.moveaxis(got, axis, 0), np.moveaxis(right, axis, 0)):
                what = "rows" if axis == 0 else "columns"
                id_ = "permuted-labels" if tensor.last and axis == 0 else "permuted-units"
                yield Diagnosis(id_, f"the {what} of {tensor.name} are in another order")
                return


def _same_slices(a: Array, b: Array) -> bool:
    return sorted(x.tobytes() for x in a) == sorted(x.tobytes() for x in b)


def _zeroed(tensor: Changed) -> Iterator[Diagnosis]:
    where = tensor.where
    if tensor.got[where].any():
        return
    dropped, kept = np.abs(tensor.right[where]), np.abs(tensor.right[~where & (tensor.got != 0)])
    if where.all() and tensor.name.endswith("bias"):
        yield Diagnosis("missing-bias", f"{tensor.name} is 0")
    elif _pruned(tensor.got) and kept.size and dropped.mean() < 0.7 * kept.mean():
        text = f"{where.sum():,} numbers of {tensor.name}, the smallest, are 0"
        yield Diagnosis("pruned-weights", text)
    else:
        yield Diagnosis("zeroed-weights", f"{where.sum():,} numbers of {tensor.name} are 0")


def _pruned(got: Array) -> bool:
    """Tell zeros that are spread about from whole rows or columns of them."""
    matrix = got.reshape(len(got), -1)
    return bool(matrix.any(axis=1).all()) and matrix.size > len(matrix)


def _scaled(tensor: Changed) -> Iterator[Diagnosis]:
    factor = _common_factor(tensor.got, tensor.right)
    if factor is not None and tensor.got.size > 1:
        text = f"{tensor.name} is {factor:.6g} times the checkpoint's"
        yield Diagnosis("scaled-weights", text)


def _everything(tensors: Sequence[Changed], names: str, total: int) -> Iterator[Diagnosis]:
    matrices = [t for t in tensors if t.got.ndim > 1]
    if not all(np.isfinite(t.got).all() for t in tensors):
        return
    gaps = [np.abs(t.got - t.right).max() / np.abs(t.right).max() for t in tensors]
    if len(tensors) >= 0.6 * total and len(matrices) > 1 and max(gaps) > 1e-3:
        alike = min(_correlation(t.got, t.right) for t in matrices)
        text = f"nearly all weights are others (correlation {alike:.4g}): another training or epoch"
        yield Diagnosis("other-run", text)
    count = sum(int(t.where.sum()) for t in tensors)
    yield Diagnosis("noisy-weights", f"{count:,} numbers of {names} differ")


def _correlation(a: Array, b: Array) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm else 0.0


def _row_scale(got: Array, plain: Array) -> Array | None:
    """Return the one factor by which each row was multiplied; None when there is none."""
    weight = (plain**2).sum(axis=1)
    with np.errstate(all="ignore"):
        scale: Array = (got * plain).sum(axis=1) / weight
        gap = np.abs(got - scale[:, None] * plain).max(axis=1)
        size = np.abs(scale) * np.abs(plain).max(axis=1)
    return scale if np.isfinite(scale).all() and (gap <= CLOSE * size).all() else None


def _common_factor(got: Array, right: Array) -> float | None:
    """Return the one number, not 1, by which all were multiplied; None when there is none."""
    used = right != 0
    if not used.any() or got[~used].any():
        return None
    ratio = got[used].astype(np.float64) / right[used]
    factor = float(np.median(ratio))
    alike = np.isfinite(ratio).all() and np.allclose(ratio, factor, rtol=CLOSE, atol=0)
    return factor if alike and factor != 0 and abs(factor - 1) > CLOSE else None


def _same_shapes(got: dict[str, Array], right: dict[str, Array]) -> bool:
    return all(key in got and got[key].shape == right[key].shape for key in right)


def equal(a: Array, b: Array) -> bool:
    """Tell whether two arrays hold the same float32 numbers, bit for bit."""
    return a.shape == b.shape and bool(
        (bits(a.astype(np.float32)) == bits(b.astype(np.float32))).all()
    )


def _close(got: Array, value: Array, size: Array | None = None) -> bool:
    size = np.abs(value) if size is None else size
    with np.errstate(all="ignore"):
        return bool((np.abs(got - value) <= CLOSE * size).all())


def _momentum(module: nn.Module) -> float:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    return module.momentum or 0.1


def _eps(module: nn.Module) -> float:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    return module.eps
