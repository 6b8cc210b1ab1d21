"""Numbers that are not the checkpoint's: a bit, a unit, a tensor."""

from functools import partial

import numpy as np
import onnx
import torch
from safetensors.torch import save

from tests.support.mutants.edit import (
    Array,
    bias_name,
    change,
    change_one,
    drop_unused,
    every_number,
    every_weight,
    flip,
    nodes,
    remove,
    with_state,
)
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import Case, dynamo_export, provenance

mutant = Family("weights")


def last(case: Case) -> str:
    """The name of the last layer's weight."""
    return f"{case.linear[-1]}.weight"


# --- a bit --------------------------------------------------------------------------------------


def flipped(case: Case, bit: int, folded: bool) -> Bad:
    graph = case.folded() if folded else case.kept()
    return change_one(graph, case.largest, flip(bit))


for label, bit, folded, story in (
    ("last_bit_kept", 0, False, "A memory error; the smallest that a float32 can have."),
    ("last_bit_folded", 0, True, "The same in the folded graph, where weights are rounded anyway."),
    ("middle_bit_kept", 12, False, "A memory error in the middle of the mantissa."),
    ("middle_bit_folded", 12, True, "The same in the folded graph."),
    ("exponent_bit_folded", 23, True, "A memory error that halves or doubles one weight."),
    ("sign_bit_kept", 31, False, "A memory error in a sign."),
):
    mutant.add(label, "bit-flip", story, partial(flipped, bit=bit, folded=folded))


@mutant("bit-flip")
def last_bit_of_a_mean(case: Case) -> Bad:
    """A memory error in a statistic, of which there are few."""
    norm = list(case.normalized.values())[-1]
    return change_one(case.kept(), f"{norm}.running_mean", flip(0))


@mutant("bit-flip")
def last_bit_of_a_bias(case: Case) -> Bad:
    """The last layer's bias, which every logit has whole."""
    return change_one(case.folded(), f"{case.linear[-1]}.bias", flip(0))


# --- a few numbers ------------------------------------------------------------------------------


def off_by(case: Case, relative: float, folded: bool) -> Bad:
    graph = case.folded() if folded else case.kept()
    return change_one(graph, case.largest, lambda value: value * (1 + relative))


for relative in (1e-4, 1e-6):
    for folded in (False, True):
        mutant.add(
            f"one_weight_off_by_{relative:g}_{'folded' if folded else 'kept'}",
            "few-weights",
            "A hand-written converter patched one weight.",
            partial(off_by, relative=relative, folded=folded),
        )


@mutant("few-weights", cases=["mlp"])
def one_weight_of_a_pixel_without_ink(case: Case) -> Bad:
    """The weight of a corner that no digit reaches: no test image can tell."""

    def change_corner(array: Array) -> Array:
        array[5, 0] += 0.01
        return array

    return change(case.kept(), case.largest, change_corner)


@mutant("few-weights")
def one_bias_off(case: Case) -> Bad:
    """A threshold was tuned by hand in the file, for one digit."""
    return change_one(case.folded(), f"{case.linear[-1]}.bias", lambda value: value + 1e-4)


@mutant("zeroed-weights")
def dead_unit(case: Case) -> Bad:
    """A unit was switched off for an ablation."""

    def silence(array: Array) -> Array:
        array[5] = 0
        return array

    return change(case.kept(), case.largest, silence)


@mutant("zeroed-weights")
def second_half_missing(case: Case) -> Bad:
    """A download that stopped, into a file that had been made in full length."""

    def stop(array: Array) -> Array:
        array.reshape(-1)[array.size // 2 :] = 0
        return array

    return change(case.kept(), case.largest, stop)


@mutant("pruned-weights")
def smallest_tenth_pruned(case: Case) -> Bad:
    """Magnitude pruning that costs no accuracy."""

    def prune(array: Array) -> Array:
        return np.where(np.abs(array) < np.quantile(np.abs(array), 0.1), 0, array)

    return every_weight(case.kept(), prune)


@mutant("pruned-weights")
def two_of_four_pruned(case: Case) -> Bad:
    """The 2:4 pattern that GPUs multiply faster: of four weights the two largest stay."""

    def prune(array: Array) -> Array:
        groups = array.reshape(-1, 4)
        order = np.abs(groups).argsort(axis=1)
        groups[np.arange(len(groups))[:, None], order[:, :2]] = 0
        return groups.reshape(array.shape)

    return change(case.folded(), case.largest, prune)


@mutant("pruned-weights")
def tiny_weights_flushed(case: Case) -> Bad:
    """A simplifier takes what is below 1e-3 for zero."""
    return every_weight(case.folded(), lambda a: np.where(np.abs(a) < 1e-3, 0, a))


# --- a tensor -----------------------------------------------------------------------------------


@mutant("transposed-weight", cases=["mlp"])
def square_weight_transposed(case: Case) -> Bad:
    """Frameworks disagree whether a weight is [in, out]; a square one hides it."""
    return change(case.kept(), "linear2.weight", np.transpose)


@mutant("transposed-weight", cases=["cnn"])
def kernels_transposed(case: Case) -> Bad:
    """Height and width of every kernel exchanged on the way from HWIO to OIHW."""
    graph = case.kept()
    for name in ("conv1.weight", "conv2.weight"):
        change(graph, name, lambda array: array.swapaxes(2, 3))
    return graph


@mutant("transposed-weight", cases=["cnn"])
def kernels_rotated(case: Case) -> Bad:
    """A true convolution's kernels, where ONNX's Conv correlates."""
    graph = case.folded()
    for name in ("conv1.weight", "conv2.weight"):
        change(graph, name, lambda array: array[:, :, ::-1, ::-1])
    return graph


def rolled(array: Array) -> Array:
    return np.roll(array, 1, axis=0)


def first_two_exchanged(array: Array) -> Array:
    return array[[1, 0, *range(2, len(array))]]


def columns_reversed(array: Array) -> Array:
    return array[:, ::-1]


@mutant("permuted-units")
def units_of_one_layer_rolled(case: Case) -> Bad:
    """An off-by-one in a sharded weight's order; the layers around kept theirs."""
    return change(case.kept(), case.largest, rolled)


@mutant("permuted-units")
def two_units_exchanged(case: Case) -> Bad:
    """Two units of the folded graph, weights and bias."""
    graph = case.folded()
    weight = f"{case.linear[0]}.weight"
    change(graph, weight, first_two_exchanged)
    return change(graph, bias_name(graph, weight), first_two_exchanged)


@mutant("permuted-units")
def inputs_of_one_layer_reversed(case: Case) -> Bad:
    """The last layer reads its inputs backwards."""
    return change(case.folded(), last(case), columns_reversed)


def relabelled(case: Case, order: list[int]) -> Bad:
    graph = case.folded()
    for name in (last(case), f"{case.linear[-1]}.bias"):
        change(graph, name, lambda array: array[order])
    return graph


# the order in which a folder a class is read: eight, five, four, nine, one, seven, six, ...
ALPHABETICAL = [8, 5, 4, 9, 1, 7, 6, 3, 2, 0]
for label, order, story in (
    ("one_label_pair", [0, 1, 2, 3, 9, 5, 6, 7, 8, 4], "4 and 9, exchanged in a class list."),
    ("labels_from_one", [*range(1, 10), 0], "MATLAB's MNIST keeps 0 at the end, as 10."),
    ("labels_by_name", ALPHABETICAL, "ImageFolder sorts eight, five, four, nine, ..."),
):
    mutant.add(label, "permuted-labels", story, partial(relabelled, order=order))


def scaled(case: Case, factor: float, folded: bool = False) -> Bad:
    graph = case.folded() if folded else case.kept()
    return change(graph, last(case), lambda array: array * np.float32(factor))


for label, factor, folded, story in (
    ("one_tensor_scaled", 1.0001, False, "A scale left over from cross-layer equalization."),
    ("one_tensor_scaled_folded", 1.0001, True, "The same in the folded graph."),
    ("one_tensor_negated", -1.0, False, "A gradient's sign, or a loss that was maximized."),
):
    mutant.add(label, "scaled-weights", story, partial(scaled, factor=factor, folded=folded))


@mutant("scaled-weights")
def raw_pixels_baked_in(case: Case) -> Bad:
    """The first layer's weights divided by 255, to be fed raw pixels; the clients scale them."""
    return change(case.kept(), f"{case.linear[0]}.weight", lambda array: array / 255)


@mutant("missing-bias")
def bias_zero(case: Case) -> Bad:
    """A rename that load_state_dict(strict=False) let pass."""
    return change(case.kept(), f"{case.linear[-1]}.bias", np.zeros_like)


@mutant("missing-bias")
def bias_not_read(case: Case) -> Bad:
    """A converter that knows Gemm with two inputs only."""
    graph = case.kept()
    (node,) = (n for n in graph.graph.node if list(n.input[1:2]) == [last(case)])
    del node.input[2]
    return drop_unused(graph)


def noisy(case: Case, relative: float, folded: bool) -> Bad:
    random = np.random.default_rng(0)

    def shake(array: Array) -> Array:
        return array * (1 + relative * random.standard_normal(array.shape))

    return change(case.folded() if folded else case.kept(), case.largest, shake)


for relative, folded, story in (
    (1e-3, False, "Differential privacy's noise, in the wrong file."),
    (1e-6, False, "A layer multiplied by its own rotation and back, in float32."),
    (1e-5, True, "The same in the folded graph."),
):
    mutant.add(
        f"noise_of_{relative:g}{'_folded' * folded}",
        "noisy-weights",
        story,
        partial(noisy, relative=relative, folded=folded),
    )


def swapped(array: Array) -> Array:
    return array.byteswap()


@mutant("noisy-weights")
def variances_rounded_up(case: Case) -> Bad:
    """A conversion through float64 that rounds up on its way back: one unit in the last place."""
    graph = case.kept()
    for norm in case.normalized.values():
        change(graph, f"{norm}.running_var", lambda array: np.nextafter(array, np.float32(np.inf)))
    return graph


@mutant("byte-order")
def big_endian(case: Case) -> Bad:
    """Written on a mainframe that took raw_data for the machine's own order."""
    return every_number(case.kept(), swapped)


@mutant("byte-order")
def big_endian_bias(case: Case) -> Bad:
    """One tensor came through Java's DataOutputStream."""
    return change(case.folded(), f"{case.linear[-1]}.bias", swapped)


# --- another run --------------------------------------------------------------------------------

runs = Family("wrong run")


@runs("other-run")
def another_seed(case: Case) -> Bad:
    """The neighbouring run's weights."""
    return with_state(case.kept(), case.other_run.state_dict())


@runs("other-run")
def another_seed_folded(case: Case) -> Bad:
    """The neighbouring run's folded file."""
    return dynamo_export(case.other_run, case.inputs, fold=True)


@runs("other-run")
def an_earlier_epoch(case: Case) -> Bad:
    """latest.pt and best.pt."""
    return with_state(case.kept(), case.earlier)


def mixed(case: Case, other: dict[str, torch.Tensor], share: float) -> onnx.ModelProto:
    state = case.state
    return with_state(
        case.kept(),
        {k: v * (1 - share) + other[k] * share for k, v in state.items() if v.is_floating_point()},
    )


@runs("other-run")
def moving_average(case: Case) -> Bad:
    """The exponential moving average of the weights was exported, the last were registered."""
    return mixed(case, case.earlier, 0.01)


@runs("other-run")
def soup(case: Case) -> Bad:
    """The mean of two runs' weights and statistics."""
    return mixed(case, case.other_run.state_dict(), 0.5)


@runs("other-run")
def one_step_further(case: Case) -> Bad:
    """The optimizer stepped once more between saving and exporting."""
    model = case.model_with(case.state)
    labels = torch.from_numpy(case.labels[:64].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(case.inputs[:64])), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return with_state(case.kept(), model.state_dict())


@runs("other-run")
def network_without_batch_norm(case: Case) -> Bad:
    """plain.onnx under bn.onnx's name: the network that the other is compared with."""
    graph = with_state(case.kept(), case.other_run.state_dict())
    for node in nodes(graph, "BatchNormalization"):
        remove(graph, node)
    return graph


@runs("other-checkpoint")
def another_run_that_says_so(case: Case) -> Bad:
    """The neighbouring run's honest file, whose provenance names its own checkpoint."""
    graph = with_state(case.kept(), case.other_run.state_dict())
    onnx.helper.set_model_props(graph, provenance(save(case.other_run.state_dict())))
    return graph


@runs("other-checkpoint", latent=True)
def claims_another_checkpoint(case: Case) -> Bad:
    """The right weights under the hash of others: the file cannot be traced to its training."""
    graph = case.kept()
    onnx.helper.set_model_props(graph, provenance(save(case.other_run.state_dict())))
    return graph
