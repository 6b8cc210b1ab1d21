"""Diagnosis: mistakes that turn the checkpoint's batch norm, kept or folded, into the file's.

Each rule applies a known mistake to the correct numbers and compares.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.parity.layers import BatchNorm, Layer
from mnist_batchnorm.parity.operators import Array
from mnist_batchnorm.parity.report import Diagnosis
from mnist_batchnorm.parity.weight_faults import (
    CLOSE,
    common_factor,
    equal,
    is_close,
    round_mantissa,
)
from mnist_batchnorm.parity.weights import ROUNDOFF, WeightedLayer, affine, tensors_of

SCALE_CLOSE = 4e-7  # relative tolerance of the factor of a whole row: about 6 roundings


@dataclass(frozen=True)
class Norm:
    """A batch-norm layer in float64, ``[units]`` each."""

    name: str
    gamma: Float64
    beta: Float64
    mean: Float64
    variance: Float64
    eps: float
    momentum: float

    @classmethod
    def of(cls, layer: Layer) -> "Norm":
        module = layer.module
        assert isinstance(module, BatchNorm)
        keys = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (affine(layer)[key].astype(np.float64) for key in keys)
        momentum = module.momentum or 0.1
        return cls(layer.name, gamma, beta, mean, variance, module.eps, momentum)

    @property
    def deviation(self) -> Float64:
        deviation: Float64 = np.sqrt(self.variance + self.eps)
        return deviation

    @property
    def scale(self) -> Float64:
        return self.gamma / self.deviation


def explain_batch_norm(part: WeightedLayer, others: Sequence[WeightedLayer]) -> Iterator[Diagnosis]:
    """Yield diagnoses of a batch norm that the file keeps, among all its weighted layers."""
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
        if other is not part and isinstance(other.layer.module, BatchNorm):
            theirs = affine(other.layer)
            if any(equal(got[key], theirs[key]) for key in ("running_mean", "running_var")):
                text = f"the statistics of {name} are those of {other.layer.name}"
                yield Diagnosis("other-layer-statistics", text)
    mean_differs, variance_differs = not equal(new_mean, mean), not equal(new_variance, variance)
    if (mean_differs and not new_mean.any()) or (variance_differs and np.all(new_variance == 1)):
        text = f"the running statistics of {name} are the initial ones, mean 0 or variance 1"
        yield Diagnosis("reset-statistics", text)
    if not equal(got["weight"], norm["weight"]) and np.all(got["weight"] == 1):
        yield Diagnosis("missing-affine", f"gamma of {name} is 1")
    if not equal(got["bias"], norm["bias"]) and not got["bias"].any():
        yield Diagnosis("missing-affine", f"beta of {name} is 0")
    if variance_differs:
        yield from _explain_variance(Norm.of(part.layer), new_variance)


def _explain_variance(norm: Norm, got: Array) -> Iterator[Diagnosis]:
    name, right = norm.name, norm.variance
    added = got.astype(np.float64) - right
    best = float(added[np.argmin(right)])  # of the unit with the least rounding
    noise = 2 * ROUNDOFF * right
    if best > noise.min() and (np.abs(added - best) <= noise).all():
        text = f"{best:.3g} was added to the running variance of {name}, and epsilon is added again"
        yield Diagnosis("epsilon", text)
    wrong = {
        "the standard deviation": np.sqrt(right),
        "the standard deviation, epsilon included": norm.deviation,
        "1 over the standard deviation": 1 / norm.deviation,
        "the variance's square": right**2,
    }
    for what, value in wrong.items():
        if is_close(got, value):
            text = f"the running variance of {name} holds {what}"
            yield Diagnosis("std-for-variance", text)
    yield from _explain_factor(norm, common_factor(got, right))


def _explain_factor(norm: Norm, factor: float | None) -> Iterator[Diagnosis]:
    if factor is None:
        return
    n = 1 / abs(1 - factor) + (factor > 1)  # (n - 1) / n or its inverse
    if abs(factor - (1 - norm.momentum)) < CLOSE:
        text = "equal a checkpoint one train-mode forward on zeros later"
        yield Diagnosis("moved-statistics", f"the statistics of {norm.name} {text}")
    elif 1.5 < n < 1e5 and abs(n - round(n)) < 1e-3 * n:
        share = f"{round(n) - 1}/{round(n)}" if factor < 1 else f"{round(n)}/{round(n) - 1}"
        text = f"the running variance of {norm.name} is {share} of the checkpoint's"
        why = "the biased estimate in place of the unbiased, or the reverse"
        yield Diagnosis("biased-variance", f"{text}: {why}")
    else:
        text = f"the running variance of {norm.name} is {factor:.6g} times the checkpoint's"
        yield Diagnosis("scaled-weights", text)


def explain_statistics(parts: Sequence[WeightedLayer]) -> Iterator[Diagnosis]:
    """Yield a diagnosis if running statistics moved while all learned tensors stayed.

    One forward in train mode makes (1 - m) old + m batch of each (PyTorch's momentum m): the batch
    that would explain the file must be a plausible one.
    """
    moved, distances, ratios = [], [], []
    for part in parts:
        got, own = part.step.tensors, affine(part.layer)
        if not _same_shapes(got, own) or any(
            not equal(got[key], own[key]) for key in ("weight", "bias")
        ):
            return
        if all(equal(got[key], own[key]) for key in ("running_mean", "running_var")):
            continue
        norm = Norm.of(part.layer)
        moved.append(norm.name)
        spread = np.sqrt(np.maximum(norm.variance, np.finfo(np.float64).tiny))
        distances.append(np.abs(got["running_mean"] - norm.mean) / norm.momentum / spread)
        old = (1 - norm.momentum) * norm.variance
        ratios.append((got["running_var"] - old) / norm.momentum / (spread**2))
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


def explain_fold(part: WeightedLayer, norms: Sequence[Layer]) -> Iterator[Diagnosis]:
    """Yield the wrong formula by which ``part.batch_norm`` was folded into a layer.

    ``norms`` are all batch norms of the network.
    """
    assert part.batch_norm is not None
    own, norm = tensors_of(part.layer), Norm.of(part.batch_norm)
    weight, bias = part.step.tensors.get("weight"), part.step.tensors.get("bias")
    name = f"{norm.name} into {part.layer.name}"
    if weight is None or weight.shape != own["weight"].shape:
        return
    plain = own["weight"].astype(np.float64).reshape(len(norm.gamma), -1)
    rows = weight.astype(np.float64).reshape(plain.shape)
    linear_bias = own.get("bias", np.zeros(len(plain))).astype(np.float64)
    scale, ones = _row_scale(rows, plain), np.ones_like(norm.scale)
    if scale is None:
        square = plain.shape[0] == plain.shape[1]
        if square and is_close(rows, plain * norm.scale[None, :]):
            yield Diagnosis("bad-fold", f"folding {name}: columns were scaled, not rows")
    elif _same_scale(scale, ones) and not _same_scale(norm.scale, ones):
        if bias is None or is_close(bias, linear_bias):
            yield Diagnosis("batch-norm-missing", f"{norm.name} is neither kept nor folded")
        else:
            yield Diagnosis("bad-fold", f"folding {name} left the weights as they were")
    elif not _same_scale(scale, norm.scale):
        yield from _explain_other_norm(name, scale, norm, norms)
        yield from _explain_scale(name, scale, norm)
    else:
        shift = np.zeros_like(norm.beta) if bias is None else bias.astype(np.float64)
        yield from _explain_shift(name, shift, norm, linear_bias)


def _explain_shift(name: str, shift: Float64, norm: Norm, bias: Float64) -> Iterator[Diagnosis]:
    scale, mean, beta = norm.scale, norm.mean, norm.beta
    wrong = {
        "the bias was not folded": bias,
        "the bias is missing": np.zeros_like(beta),
        "without the running mean": scale * bias + beta,
        "with the mean's sign turned": scale * (bias + mean) + beta,
        "without beta": scale * (bias - mean),
        "with beta's sign turned": scale * (bias - mean) - beta,
        "the layer's own bias is missing": beta - scale * mean,
        "the layer's own bias was not scaled": bias - scale * mean + beta,
        "the mean was not scaled": scale * bias - mean + beta,
        "the bias was not scaled": bias - mean + beta,
        "beta was scaled": scale * (bias - mean + beta),
        "only beta is left of the bias": beta,
        "the layer's own bias was added twice": scale * (2 * bias - mean) + beta,
        "the layer's own bias was added unscaled": bias + beta - scale * mean,
        "the mean was left out with the layer's own bias": scale * bias,
    }
    size = np.abs(scale) * (np.abs(mean) + np.abs(bias)) + np.abs(beta)
    right = scale * (bias - mean) + beta
    if is_close(shift, right, size):
        return
    for what, value in wrong.items():
        if is_close(shift, value, size):
            yield Diagnosis("bad-fold", f"folding {name}: {what}")
            return
    if (np.abs(shift - right) > CLOSE * size).mean() > 0.9:
        yield Diagnosis("bad-fold", f"folding {name}: the bias is not the fold's")


def _explain_other_norm(
    name: str, scale: Float64, own: Norm, norms: Sequence[Layer]
) -> Iterator[Diagnosis]:
    for other in map(Norm.of, norms):
        if other.name != own.name and other.variance.shape == own.variance.shape:
            deviation = np.sqrt(other.variance + own.eps)
            if _same_scale(scale, own.gamma / deviation):
                text = f"folded {name} with the statistics of {other.name}"
                yield Diagnosis("other-layer-statistics", text)
            elif _same_scale(scale, other.gamma / deviation):
                yield Diagnosis("bad-fold", f"folding {name}: {other.name} was folded instead")


def _explain_scale(name: str, scale: Float64, norm: Norm) -> Iterator[Diagnosis]:
    gamma, eps, variance = norm.gamma, norm.eps, norm.variance
    deviation, right = norm.deviation, norm.scale
    half = right.astype(np.float16).astype(np.float64)
    brain = round_mantissa(right.astype(np.float32), 16).astype(np.float64)
    wrong = {
        "epsilon added after the square root": ("bad-fold", gamma / (np.sqrt(variance) + eps)),
        "without gamma": ("bad-fold", 1 / deviation),
        "with gamma's sign lost": ("bad-fold", np.abs(right)),
        "with gamma + 1": ("bad-fold", (gamma + 1) / deviation),
        "without the square root": ("bad-fold", gamma / (variance + eps)),
        "with the deviation in the variance's place": (
            "std-for-variance",
            gamma / np.sqrt(deviation + eps),
        ),
        "with the inverse deviation in the variance's place": (
            "std-for-variance",
            gamma / np.sqrt(1 / deviation + eps),
        ),
        "without the variance": ("bad-fold", gamma),
        "multiplied by the deviation": ("bad-fold", gamma * deviation),
        "twice": ("bad-fold", right**2),
        "gamma divided out instead of in": ("bad-fold", 1 / (gamma * deviation)),
        "with variance 1": ("reset-statistics", gamma / np.sqrt(1 + eps)),
        "with the mean in the variance's place": (
            "swapped-statistics",
            gamma / np.sqrt(np.abs(norm.mean) + eps),
        ),
        "with beta in gamma's place": ("swapped-affine", norm.beta / deviation),
        "in float16": ("float16", half),
        "in bfloat16": ("bfloat16", brain),
        "with the neighbouring unit's": ("bad-fold", np.roll(right, 1)),
        "with the other neighbouring unit's": ("bad-fold", np.roll(right, -1)),
        "with the neighbouring unit's variance": ("bad-fold", gamma / np.roll(deviation, 1)),
        "with the other neighbouring unit's variance": ("bad-fold", gamma / np.roll(deviation, -1)),
        "into the units in another order": ("permuted-units", _reordered_as(right, scale)),
    }
    for what, (id_, value) in wrong.items():
        if _same_scale(scale, value):
            yield Diagnosis(id_, f"folding {name}: {what}")
            return
    implied = (gamma / scale) ** 2  # variance + epsilon in the file
    added, noise = implied - variance, 2 * SCALE_CLOSE * implied
    best = float(added[np.argmin(noise)])  # of the unit with the least rounding
    if (np.abs(added - best) <= noise).all() and abs(best - eps) > noise.min():
        if abs(best) <= noise.min():
            yield Diagnosis("bad-fold", f"folding {name}: without epsilon")
        text = f"folded {name} with epsilon {best:.3g}, the checkpoint has {eps:g}"
        yield Diagnosis("epsilon", text)
    yield from _explain_factor(replace(norm, name=name), common_factor(implied - eps, variance))
    if common_factor(scale, right) is None:
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


def _reordered_as(right: Array, scale: Array) -> Array:
    """Return the correct factors in the order of the file's."""
    order = np.empty(len(right), int)
    order[np.argsort(scale)] = np.argsort(right)
    return right[order]


def _row_scale(got: Array, plain: Array) -> Float64 | None:
    """Return the factor by which each row was multiplied, if each has one."""
    with np.errstate(all="ignore"):
        scale: Float64 = (got * plain).sum(axis=1) / (plain**2).sum(axis=1)
        gap = np.abs(got - scale[:, None] * plain).max(axis=1)
        size = np.abs(scale) * np.abs(plain).max(axis=1)
    return scale if np.isfinite(scale).all() and (gap <= CLOSE * size).all() else None


def _same_shapes(got: dict[str, Array], right: dict[str, Array]) -> bool:
    return all(key in got and got[key].shape == right[key].shape for key in right)
