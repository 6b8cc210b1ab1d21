"""Running statistics that are not those that training left, and what batch norm does with them."""

from functools import partial

import numpy as np
import torch

from tests.support.mutants.edit import (
    change,
    change_one,
    drop_unused,
    forwards,
    nodes,
    set_attribute,
    with_state,
)
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import BATCH, Case, State

mutant = Family("statistics")
epsilon_mutant = Family("epsilon")
momentum_mutant = Family("momentum")


def keys(case: Case, suffix: str) -> list[str]:
    return [name for name in case.state if name.startswith("bn") and name.endswith(suffix)]


@mutant("reset-statistics")
def reset(case: Case) -> Bad:
    """load_state_dict(strict=False) of a checkpoint without buffers leaves zeros and ones."""
    return with_state(
        case.kept(),
        {k: torch.zeros_like(case.state[k]) for k in keys(case, "mean")}
        | {k: torch.ones_like(case.state[k]) for k in keys(case, "var")},
    )


@mutant("reset-statistics")
def reset_in_one_layer(case: Case) -> Bad:
    """One layer was replaced for fine-tuning and never saw data."""
    graph = change(case.kept(), "bn2.running_mean", np.zeros_like)
    return change(graph, "bn2.running_var", np.ones_like)


@mutant("reset-statistics")
def only_means_reset(case: Case) -> Bad:
    """A conversion script that knows only ``moving_variance`` under its old name."""
    return with_state(case.kept(), {k: torch.zeros_like(case.state[k]) for k in keys(case, "mean")})


@mutant("reset-statistics")
def only_variances_reset(case: Case) -> Bad:
    """The same script, the other name."""
    return with_state(case.kept(), {k: torch.ones_like(case.state[k]) for k in keys(case, "var")})


@mutant("moved-statistics")
def one_forward_later(case: Case) -> Bad:
    """A sanity check ran one batch between training and export, without model.eval()."""
    return with_state(case.kept(), forwards(case, 1))


@mutant("moved-statistics")
def many_forwards_later(case: Case) -> Bad:
    """The whole validation ran in train mode."""
    return with_state(case.kept(), forwards(case, 10))


@mutant("moved-statistics")
def one_forward_later_in_one_layer(case: Case) -> Bad:
    """The same with all layers but one frozen."""
    moved = forwards(case, 1)
    return with_state(case.kept(), {k: v for k, v in moved.items() if k.startswith("bn1.running")})


@mutant("moved-statistics")
def exported_with_a_dummy_in_train_mode(case: Case) -> Bad:
    """torch.randn went through the model in train mode to find out its output shape."""
    noise = np.random.default_rng(0).normal(size=case.inputs[:32].shape).astype(np.float32)
    return with_state(case.kept(), forwards(case, 1, inputs=noise))


@mutant("moved-statistics")
def hardly_moved(case: Case) -> Bad:
    """A forward with a momentum that someone had lowered to 1e-4: they freeze it almost."""
    return with_state(case.kept(), forwards(case, 1, momentum=1e-4))


@mutant("moved-statistics")
def recalibrated_on_other_data(case: Case) -> Bad:
    """Statistics renewed as averages over the test set, by a script run on the wrong folder."""
    return with_state(case.kept(), forwards(case, 15, momentum=None))


@mutant("moved-statistics")
def of_images_not_divided_by_255(case: Case) -> Bad:
    """Statistics renewed by a loader that forgot to scale its pixels."""
    return with_state(case.kept(), forwards(case, 15, momentum=None, inputs=case.inputs * 255))


@mutant("moved-statistics")
def raw_second_moment(case: Case) -> Bad:
    """The mean of squares is stored for the variance."""
    state = case.state
    moments = {k: state[k] + state[k.replace("var", "mean")] ** 2 for k in keys(case, "var")}
    return with_state(case.kept(), moments)


@mutant("moved-statistics")
def half_the_training(case: Case) -> Bad:
    """Weights of the last epoch with the buffers of an earlier one: two files were merged."""
    return with_state(case.kept(), {k: v for k, v in case.earlier.items() if ".running" in k})


def replaced(_: float, by: float) -> float:
    return by


@mutant("few-weights")
def one_stale_unit(case: Case) -> Bad:
    """One unit's statistics were not written back after a channel had been re-grown."""
    graph = case.kept()
    for key in ("bn1.running_mean", "bn1.running_var"):
        change_one(graph, key, partial(replaced, by=case.earlier[key][5].item()))
    return graph


@mutant("swapped-statistics")
def mean_and_variance_swapped(case: Case) -> Bad:
    """A converter sorted the names: gamma, beta, var, mean."""
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization"):
        node.input[3], node.input[4] = node.input[4], node.input[3]
    return graph


@mutant("swapped-statistics")
def mean_and_variance_swapped_in_one_layer(case: Case) -> Bad:
    """The same by hand, in the one layer that was converted by hand."""
    mean, variance = "bn2.running_mean", "bn2.running_var"
    return with_state(case.kept(), {mean: case.state[variance], variance: case.state[mean]})


@mutant("other-layer-statistics", cases=["mlp"])
def layers_exchanged(case: Case) -> Bad:
    """Buffers were matched to layers by shape, and two layers have the same."""
    other = {"bn1": "bn2", "bn2": "bn1"}
    running = {k: v for k, v in case.state.items() if ".running" in k}
    return with_state(case.kept(), {other[k[:3]] + k[3:]: v for k, v in running.items()})


@mutant("other-layer-statistics", cases=["mlp"])
def one_tensor_of_another_layer(case: Case) -> Bad:
    """A deduplication of equal tensors hashed too little: two layers share one variance."""
    graph = case.kept()
    first, second = nodes(graph, "BatchNormalization")
    second.input[4] = first.input[4]
    return drop_unused(graph)


@mutant("std-for-variance")
def deviation_for_variance(case: Case) -> Bad:
    """A framework that stores the standard deviation was the source."""
    return with_state(case.kept(), {k: case.state[k].sqrt() for k in keys(case, "var")})


@mutant("std-for-variance")
def inverse_deviation_for_variance(case: Case) -> Bad:
    """cuDNN's saved 1/sqrt(var + eps) was taken for the variance."""
    return with_state(case.kept(), {k: (case.state[k] + 1e-5).rsqrt() for k in keys(case, "var")})


def with_variance_times(case: Case, factor: float, name: str = "var") -> Bad:
    return with_state(case.kept(), {k: case.state[k] * factor for k in keys(case, name)})


for label, factor, story in (
    ("biased", (BATCH - 1) / BATCH, "The biased variance, where training keeps the unbiased one."),
    ("biased_over_all_images", 1799 / 1800, "The same, over the training set: a factor of 0.9994."),
    ("unbiased_twice", BATCH / (BATCH - 1), "Bessel's correction applied by two tools in a row."),
):
    mutant.add(label, "biased-variance", story, partial(with_variance_times, factor=factor))


@mutant("not-finite")
def not_a_number(case: Case) -> Bad:
    """One half-precision batch overflowed before the export; the unit's mean is NaN."""
    return change_one(case.kept(), "bn1.running_mean", partial(replaced, by=np.nan))


@mutant("not-finite")
def infinite_variance(case: Case) -> Bad:
    """The same, to infinity: the unit is silently constant, all outputs are finite."""
    return change_one(case.kept(), "bn1.running_var", partial(replaced, by=np.inf))


@mutant("few-weights")
def negative_variance(case: Case) -> Bad:
    """E[x^2] - E[x]^2 of a unit that hardly varies cancelled below zero."""
    return change_one(case.kept(), "bn2.running_var", partial(replaced, by=-1e-6))


@mutant("permuted-units")
def units_shuffled(case: Case) -> Bad:
    """Per-unit files were read in the order 0, 1, 10, 11, 2, ..."""
    graph = case.kept()
    norm = list(case.normalized.values())[-1]
    for key in ("running_mean", "running_var"):
        change(graph, f"{norm}.{key}", lambda array: array[sorted(range(len(array)), key=str)])
    return graph


@mutant("swapped-affine")
def gamma_and_beta_swapped(case: Case) -> Bad:
    """weight and bias in the order in which another framework lists them: beta, gamma."""
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization"):
        node.input[1], node.input[2] = node.input[2], node.input[1]
    return graph


def without(case: Case, suffixes: tuple[str, ...]) -> Bad:
    state: State = {}
    for suffix in suffixes:
        value = float(suffix == ".weight")
        state |= {k: torch.full_like(case.state[k], value) for k in keys(case, suffix)}
    return with_state(case.kept(), state)


for label, suffixes, story in (
    ("affine_lost", (".weight", ".bias"), "The layers were rebuilt with affine=False."),
    ("gamma_lost", (".weight",), "scale=False, as Keras advises before a ReLU."),
    ("beta_lost", (".bias",), "center=False."),
):
    mutant.add(label, "missing-affine", story, partial(without, suffixes=suffixes))


# --- epsilon ------------------------------------------------------------------------------------


def with_epsilon(case: Case, epsilon: float, layers: slice = slice(None)) -> Bad:
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization")[layers]:
        set_attribute(node, "epsilon", epsilon)
    return graph


for label, epsilon, story in (
    ("epsilon_1e-3", 1e-3, "Keras's default."),
    ("epsilon_1e-6", 1e-6, "A converter's own default."),
    ("epsilon_1e-12", 1e-12, "BERT's habit."),
    ("epsilon_0", 0.0, "Variances are positive anyway, thought someone."),
    ("epsilon_2e-5", 2e-5, "Added twice: already in the exported variance's own epsilon."),
    ("epsilon_float16", float(np.float16(1e-5)), "1.0014e-05: the attribute went through half."),
):
    epsilon_mutant.add(label, "epsilon", story, partial(with_epsilon, epsilon=epsilon))
epsilon_mutant.add(
    "epsilon_of_one_layer",
    "epsilon",
    "One layer was built by other code, with 1e-6.",
    partial(with_epsilon, epsilon=1e-6, layers=slice(-1, None)),
)


@epsilon_mutant("epsilon")
def epsilon_in_the_variance(case: Case) -> Bad:
    """The variance already holds epsilon, and the node adds it again."""
    return with_state(case.kept(), {k: case.state[k] + 1e-5 for k in keys(case, "var")})


# --- momentum -----------------------------------------------------------------------------------


def with_momentum(case: Case, momentum: float) -> Bad:
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization"):
        set_attribute(node, "momentum", momentum)
    return graph


for label, momentum, story in (
    ("momentum_0.1", 0.1, "PyTorch's momentum, which weighs the new batch; ONNX's weighs the old."),
    ("momentum_0.99", 0.99, "Keras's default."),
):
    momentum_mutant.add(
        label, "momentum", story, partial(with_momentum, momentum=momentum), latent=True
    )


@momentum_mutant("moved-statistics")
def forward_with_the_weights_exchanged(case: Case) -> Bad:
    """Keras's 0.9 as PyTorch's momentum: one forward replaced nine tenths of the statistics."""
    return with_state(case.kept(), forwards(case, 1, momentum=0.9))
