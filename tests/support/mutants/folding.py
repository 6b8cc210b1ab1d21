"""Batch norm folded into the layer before it, wrongly, twice, or not at all.

A right fold is W' = s W and b' = s (b - mean) + beta, with s = gamma / sqrt(var + eps).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch

from tests.support.mutants.edit import Array, bias_name, forwards, nodes, put, remove
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import Case

mutant = Family("folding")


@dataclass(frozen=True)
class Numbers:
    """A layer and its batch norm, float64; of the latter one number a unit."""

    weight: Array
    bias: Array
    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    epsilon: float

    @property
    def scale(self) -> Array:
        return np.asarray(self.gamma / np.sqrt(self.variance + self.epsilon))


Formula = Callable[[Numbers], tuple[Array, Array]]


def rows(scale: Array, weight: Array) -> Array:
    """Scale each unit's weights."""
    return np.asarray(scale.reshape(-1, *[1] * (weight.ndim - 1)) * weight)


def right(n: Numbers) -> tuple[Array, Array]:
    return rows(n.scale, n.weight), n.scale * (n.bias - n.mean) + n.beta


def numbers_of(case: Case, layer: str, state: Mapping[str, torch.Tensor]) -> Numbers:
    norm = case.normalized[layer]
    arrays = {k: v.double().numpy() for k, v in state.items()}
    weight = arrays[f"{layer}.weight"]
    return Numbers(
        weight,
        arrays.get(f"{layer}.bias", np.zeros(len(weight))),
        arrays[f"{norm}.weight"],
        arrays[f"{norm}.bias"],
        arrays[f"{norm}.running_mean"],
        arrays[f"{norm}.running_var"],
        case.layers[norm].eps,  # type: ignore[arg-type]
    )


def refolded(
    case: Case, formula: Formula, state: Mapping[str, torch.Tensor] | None = None
) -> onnx.ModelProto:
    """The exporter's folded graph with the numbers that a formula gives."""
    graph = case.folded()
    for layer in case.normalized:
        weight, bias = formula(numbers_of(case, layer, state or case.state))
        put(graph, f"{layer}.weight", weight.astype(np.float32))
        put(graph, bias_name(graph, f"{layer}.weight"), bias.astype(np.float32))
    return graph


@mutant("bad-fold")
def without_epsilon(case: Case) -> Bad:
    """s = gamma / sqrt(var), in many a blog post."""
    return refolded(case, lambda n: right(replace(n, epsilon=0.0)))


@mutant("bad-fold")
def epsilon_outside_the_root(case: Case) -> Bad:
    """s = gamma / (sqrt(var) + eps)."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        scale = n.gamma / (np.sqrt(n.variance) + n.epsilon)
        return rows(scale, n.weight), scale * (n.bias - n.mean) + n.beta

    return refolded(case, formula)


@mutant("epsilon")
def epsilon_of_another_framework(case: Case) -> Bad:
    """Folded by a tool that knows only 1e-3."""
    return refolded(case, lambda n: right(replace(n, epsilon=1e-3)))


@mutant("bad-fold")
def variance_for_deviation(case: Case) -> Bad:
    """s = gamma / (var + eps): the root forgotten."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        scale = n.gamma / (n.variance + n.epsilon)
        return rows(scale, n.weight), scale * (n.bias - n.mean) + n.beta

    return refolded(case, formula)


@mutant("bad-fold")
def bias_not_folded(case: Case) -> Bad:
    """Only the weights were scaled; the bias stayed as it was."""
    return refolded(case, lambda n: (rows(n.scale, n.weight), n.bias))


@mutant("bad-fold")
def bias_not_scaled(case: Case) -> Bad:
    """b' = b - s mean + beta: right for convolutions without bias, for which it was written."""
    return refolded(case, lambda n: (right(n)[0], n.bias - n.scale * n.mean + n.beta))


@mutant("bad-fold")
def mean_not_scaled(case: Case) -> Bad:
    """b' = s b - mean + beta."""
    return refolded(case, lambda n: (right(n)[0], n.scale * n.bias - n.mean + n.beta))


@mutant("bad-fold")
def mean_added(case: Case) -> Bad:
    """A sign."""
    return refolded(case, lambda n: right(replace(n, mean=-n.mean)))


@mutant("bad-fold")
def own_bias_lost(case: Case) -> Bad:
    """b' = beta - s mean: the layer's own bias forgotten."""
    return refolded(case, lambda n: right(replace(n, bias=np.zeros_like(n.bias))))


@mutant("bad-fold")
def without_gamma(case: Case) -> Bad:
    """Written for layers with scale=False."""
    return refolded(case, lambda n: right(replace(n, gamma=np.ones_like(n.gamma))))


@mutant("bad-fold")
def without_beta(case: Case) -> Bad:
    """b' = s (b - mean)."""
    return refolded(case, lambda n: right(replace(n, beta=np.zeros_like(n.beta))))


@mutant("bad-fold")
def folded_twice(case: Case) -> Bad:
    """The script ran on its own output, which has the same names."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        weight, bias = right(n)
        return right(replace(n, weight=weight, bias=bias))

    return refolded(case, formula)


@mutant("bad-fold", cases=["mlp"])
def statistics_of_the_other_layer(case: Case) -> Bad:
    """The batch norms of two layers of one width were paired the wrong way round."""
    graph = case.folded()
    for layer, other in (("linear1", "linear2"), ("linear2", "linear1")):
        n = numbers_of(case, layer, case.state)
        norm = numbers_of(case, other, case.state)
        weight, bias = right(replace(norm, weight=n.weight, bias=n.bias))
        put(graph, f"{layer}.weight", weight.astype(np.float32))
        put(graph, f"{layer}.bias", bias.astype(np.float32))
    return graph


@mutant("bad-fold")
def into_the_layer_after(case: Case) -> Bad:
    """The scale went to the next layer's inputs, as if no ReLU stood between."""
    graph = case.folded()
    (first, *_), following = case.linear, case.linear[1]
    n, after = numbers_of(case, first, case.state), numbers_of(case, following, case.state)
    put(graph, f"{first}.weight", n.weight.astype(np.float32))
    put(graph, bias_name(graph, f"{first}.weight"), n.bias.astype(np.float32))
    scale = n.scale.reshape(1, -1, *[1] * (after.weight.ndim - 2))
    weight, bias = right(replace(after, weight=after.weight * scale))
    put(graph, f"{following}.weight", weight.astype(np.float32))
    put(graph, bias_name(graph, f"{following}.weight"), bias.astype(np.float32))
    return graph


@mutant("bad-fold", cases=["mlp"])
def along_the_wrong_axis(case: Case) -> Bad:
    """W s in place of s W: a square layer takes either."""
    n = numbers_of(case, "linear2", case.state)
    graph = case.folded()
    put(graph, "linear2.weight", (n.weight * n.scale).astype(np.float32))
    return graph


@mutant("bad-fold")
def of_the_neighbouring_unit(case: Case) -> Bad:
    """Off by one: every unit has the statistics of the unit before."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        return right(replace(n, mean=np.roll(n.mean, 1), variance=np.roll(n.variance, 1)))

    return refolded(case, formula)


@mutant("bad-fold")
def approximate_root(case: Case) -> Bad:
    """The reciprocal root of an instruction set that gives twelve bits of it."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        root = 1 / np.sqrt(n.variance + n.epsilon)
        size = 2.0 ** (np.floor(np.log2(root)) - 11)
        scale = n.gamma * np.round(root / size) * size
        return rows(scale, n.weight), scale * (n.bias - n.mean) + n.beta

    return refolded(case, formula)


@mutant("biased-variance")
def folded_with_the_biased_variance(case: Case) -> Bad:
    """The statistics were right, the fold corrected them for the batch size."""
    return refolded(case, lambda n: right(replace(n, variance=n.variance * 31 / 32)))


@mutant("moved-statistics")
def folded_after_one_forward(case: Case) -> Bad:
    """A sanity check in train mode, and then the fold."""
    return refolded(case, right, forwards(case, 1))


@mutant("reset-statistics")
def folded_with_reset_statistics(case: Case) -> Bad:
    """The fold read a checkpoint without buffers: mean 0, variance 1."""
    return refolded(
        case,
        lambda n: right(replace(n, mean=np.zeros_like(n.mean), variance=np.ones_like(n.variance))),
    )


@mutant("float16")
def folded_in_half_precision(case: Case) -> Bad:
    """The model was half when it was folded, and float again afterwards."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        weight, bias = right(n)
        return weight.astype(np.float16), bias.astype(np.float16)

    return refolded(case, formula)


@mutant("double-batch-norm")
def folded_and_kept(case: Case) -> Bad:
    """The weights of the folded model under the graph that normalizes: the names are equal."""
    graph, folded = case.kept(), refolded(case, right)
    stored = {t.name: t for t in folded.graph.initializer}
    for tensor in graph.graph.initializer:
        if tensor.name in stored:
            tensor.CopyFrom(stored[tensor.name])
    return graph


@mutant("batch-norm-missing")
def dropped(case: Case) -> Bad:
    """Batch norm was taken out as if it had been folded; the weights are as before."""
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization"):
        remove(graph, node)
    return graph


@mutant("batch-norm-missing")
def last_dropped(case: Case) -> Bad:
    """A pattern matcher found all batch norms but one, and took that out as dead code."""
    graph = case.kept()
    return remove(graph, nodes(graph, "BatchNormalization")[-1])


@mutant("batch-norm-missing")
def one_not_folded(case: Case) -> Bad:
    """In the folded graph one layer has its unfolded weights."""
    graph = case.folded()
    layer = list(case.normalized)[-1]
    n = numbers_of(case, layer, case.state)
    put(graph, f"{layer}.weight", n.weight.astype(np.float32))
    put(graph, bias_name(graph, f"{layer}.weight"), n.bias.astype(np.float32))
    return graph


@mutant("bad-fold")
def one_unit_folded_wrongly(case: Case) -> Bad:
    """A dead unit's variance was taken for 1 to be safe; it was not dead."""

    def formula(n: Numbers) -> tuple[Array, Array]:
        variance = n.variance.copy()
        variance[variance.argmin()] = 1
        return right(replace(n, variance=variance))

    return refolded(case, formula)
