"""The right numbers in another network: operators, their attributes, activations, outputs."""

from functools import partial
from typing import Any

import onnx
from onnx.helper import make_node, make_tensor_value_info

from tests.support.mutants.edit import (
    after,
    at_output,
    become,
    change,
    constants,
    drop_unused,
    line,
    nodes,
    remove,
    set_attribute,
    writer,
)
from tests.support.mutants.table import Bad, Family, Spoil
from tests.support.parity_cases import OUTPUT, Case

mutant = Family("wiring")
activation = Family("activation")
output = Family("output")

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


# --- operators and their attributes -------------------------------------------------------------


@mutant("wiring")
def relu_before_batch_norm(case: Case) -> Bad:
    """Both orders are in use, and one port of the code has the other."""
    graph = case.kept()
    norm, relu = nodes(graph, "BatchNormalization")[0], nodes(graph, "Relu")[0]
    parameters = norm.input[1:]
    become(norm, "Relu")
    become(relu, "BatchNormalization", *parameters, epsilon=1e-5)
    return graph


@mutant("wiring")
def batch_norm_beside_the_path(case: Case) -> Bad:
    """Relu reads what batch norm reads; batch norm's output goes nowhere."""
    graph = case.kept()
    nodes(graph, "Relu")[0].input[0] = nodes(graph, "BatchNormalization")[0].input[0]
    return graph


@mutant("wiring", cases=["mlp"])
def block_skipped(case: Case) -> Bad:
    """LayerDrop, at inference: the second block reads and writes the same width."""
    graph = case.folded()
    second = nodes(graph, "Gemm")[1]
    return remove(remove(graph, nodes(graph, "Relu")[1]), second)


@mutant("wiring", cases=["mlp"])
def block_repeated(case: Case) -> Bad:
    """A loop that built one layer too many, with the weights of the last."""
    graph = case.folded()
    relu = nodes(graph, "Relu")[1]
    again = ("Gemm", "linear2.weight", "linear2.bias", {"transB": 1})
    return after(graph, relu, line(again, ("Relu",)))


@mutant("wiring")
def residual(case: Case) -> Bad:
    """A skip connection around an activation, from the next version of the model."""
    graph = case.kept()
    node = nodes(graph, "Relu")[0]
    return after(graph, node, [make_node("Add", ["in", node.input[0]], ["out"])])


@mutant("wiring")
def hidden_layer_as_output(case: Case) -> Bad:
    """The features, not the logits: the head was cut off for an embedding service."""
    graph = case.folded()
    head = writer(graph, OUTPUT)
    width = case.layers[case.linear[-1]].in_features
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = int(width)  # type: ignore[arg-type]
    return remove(graph, head)


@mutant("wiring")
def bias_added_twice(case: Case) -> Bad:
    """Gemm has a bias, and the Add for frameworks whose MatMul has none is still there."""
    graph = case.kept()
    last = writer(graph, OUTPUT)
    return at_output(graph, line(("Add", last.input[2])))


@mutant("wiring")
def squeezed(case: Case) -> Bad:
    """.squeeze() on the logits: a batch of one image loses its batch axis."""
    return at_output(case.kept(), line(("Squeeze",)))


@mutant("wiring")
def missing_values_cleaned(case: Case) -> Bad:
    """nan_to_num on the logits: a broken input gets a confident answer."""
    graph = constants(case.folded(), nothing=0.0)
    new = [
        make_node("IsNaN", ["in"], ["missing"]),
        make_node("Where", ["missing", "nothing", "in"], ["out"]),
    ]
    return at_output(graph, new)


def with_gemm(case: Case, name: str, value: float) -> Bad:
    graph = case.kept()
    set_attribute(writer(graph, OUTPUT), name, value)
    return graph


for label, name, value, story in (
    ("gemm_alpha", "alpha", 0.5, "A scale fused into the product, but not into the bias."),
    ("gemm_alpha_close_to_1", "alpha", 1.0001, "The same, hardly visible."),
    ("gemm_beta_0", "beta", 0.0, "The bias is there, and switched off."),
):
    mutant.add(label, "gemm-attributes", story, partial(with_gemm, name=name, value=value))


@mutant("gemm-attributes", cases=["mlp"])
def gemm_not_transposed(case: Case) -> Bad:
    """transB of a square weight lost."""
    graph = case.kept()
    set_attribute(nodes(graph, "Gemm")[1], "transB", 0)
    return graph


def with_attribute(case: Case, operator: str, attributes: dict[str, Any]) -> Bad:
    graph = case.kept()
    for name, value in attributes.items():
        set_attribute(nodes(graph, operator)[-1], name, value)
    del graph.graph.value_info[:]
    return graph


# 14 pixels, stride 2, kernel 3: one pixel of padding gives 7, no padding 6, pooled 3 each
WINDOWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("conv_padding", "Conv", {"pads": [1, 1, 1, 1]}, "PyTorch's padding=1."),
    ("conv_padding_before", "Conv", {"pads": [1, 1, 0, 0]}, "SAME, on the wrong sides."),
    ("pool_window", "MaxPool", {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}, "3 for 2."),
]
for label, operator, attributes, story in WINDOWS:
    spoil = partial(with_attribute, operator=operator, attributes=attributes)
    mutant.add(label, "wiring", story, spoil, cases=["cnn"])


@mutant("wiring", cases=["cnn"])
def average_for_maximum(case: Case) -> Bad:
    """The wrong kind of pooling."""
    graph = case.folded()
    pool = nodes(graph, "MaxPool")[0]
    become(pool, "AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    return graph


@mutant("wiring", cases=["cnn"])
def flattened_with_channels_last(case: Case) -> Bad:
    """A converter between layouts flattened [h, w, c], the weights expect [c, h, w]."""
    graph = case.kept()
    pool = nodes(graph, "AveragePool")[0]
    back = line(("Transpose", {"perm": [0, 2, 3, 1]}), ("Reshape", "flat"))
    constants(graph, flat=[0, 12, 3, 3])
    return after(graph, pool, back)


# --- activations --------------------------------------------------------------------------------


def with_activation(case: Case, operator: str, attributes: dict[str, float]) -> Bad:
    graph = case.kept()
    become(nodes(graph, "Relu")[0], operator, **attributes)
    return graph


ACTIVATIONS: list[tuple[str, str, dict[str, float], str]] = [
    ("leaky", "LeakyRelu", {"alpha": 0.01}, "PyTorch's default slope."),
    ("slightly_leaky", "LeakyRelu", {"alpha": 1e-5}, "Against dead units, while training."),
    ("gelu", "Gelu", {}, "What everyone uses now."),
    ("elu", "Elu", {}, "A config's other choice."),
    ("hard_swish", "HardSwish", {}, "MobileNet's."),
    ("softplus", "Softplus", {}, "A smooth ReLU for a smooth loss."),
    ("sigmoid", "Sigmoid", {}, "An old config."),
    ("thresholded", "ThresholdedRelu", {"alpha": 1e-3}, "What is tiny is dropped, for sparsity."),
    ("identity", "Identity", {}, "A fused activation that the converter did not unfuse."),
]
for label, operator, slopes, story in ACTIVATIONS:
    spoil = partial(with_activation, operator=operator, attributes=slopes)
    activation.add(f"relu_to_{label}", "activation", story, spoil)


@activation("activation")
def relu_to_relu6(case: Case) -> Bad:
    """Mobile runtimes have ReLU6; few activations here are larger."""
    graph = constants(case.folded(), floor=0.0, ceiling=6.0)
    become(nodes(graph, "Relu")[0], "Clip", "floor", "ceiling")
    return graph


@activation("activation")
def clipped_at_half_precision(case: Case) -> Bad:
    """Activations clipped at 65504 against overflow, where nothing overflows."""
    graph = constants(case.kept(), floor=-65504.0, ceiling=65504.0)
    return after(graph, nodes(graph, "Relu")[0], line(("Clip", "floor", "ceiling")))


@activation("activation")
def relu_on_the_logits(case: Case) -> Bad:
    """A loop that puts an activation after every layer, the last too."""
    return at_output(case.kept(), line(("Relu",)))


@activation("activation")
def additional_relu_before_batch_norm(case: Case) -> Bad:
    """A fused Linear+ReLU in front of batch norm and its own ReLU."""
    graph = case.kept()
    before = writer(graph, nodes(graph, "BatchNormalization")[-1].input[0])
    return after(graph, before, line(("Relu",)))


@activation("activation", cases=["cnn"])
def slope_of_another_framework(case: Case) -> Bad:
    """Keras's LeakyReLU has 0.3."""
    graph = case.kept()
    set_attribute(nodes(graph, "LeakyRelu")[0], "alpha", 0.3)
    return graph


@activation("activation", cases=["cnn"])
def leaky_to_relu(case: Case) -> Bad:
    """A runtime without LeakyRelu."""
    graph = case.folded()
    become(nodes(graph, "LeakyRelu")[0], "Relu")
    return graph


@activation("activation", cases=["cnn"])
def relu6_to_relu(case: Case) -> Bad:
    """The upper end of a Clip lost."""
    graph = case.folded()
    become(nodes(graph, "Clip")[0], "Relu")
    return drop_unused(graph)


# --- what comes after the logits ----------------------------------------------------------------


def followed_by(steps: list[tuple[Any, ...]], numbers: dict[str, Any]) -> Spoil:
    return lambda case: at_output(constants(case.kept(), **numbers), line(*steps))


APPENDED: list[tuple[str, str, list[tuple[Any, ...]], dict[str, Any], str]] = [
    ("softmax", "softmax", [("Softmax", {"axis": 1})], {}, "The client applies it once more."),
    ("log_softmax", "softmax", [("LogSoftmax", {"axis": 1})], {}, "For an NLL loss."),
    ("softmax_over_the_batch", "softmax", [("Softmax", {"axis": 0})], {}, "dim=0 for dim=1."),
    ("sigmoid", "softmax", [("Sigmoid",)], {}, "A multi-label head."),
    ("temperature", "scaled-logits", [("Div", "t")], {"t": 1.5}, "Calibrated by a temperature."),
    ("temperature_close_to_1", "scaled-logits", [("Mul", "t")], {"t": 1.0001}, "The same, fitted."),
    ("negated", "scaled-logits", [("Neg",)], {}, "Energies, of which the lowest wins."),
    ("clipped_logits", "activation", [("Clip", "lo", "hi")], {"lo": -5.0, "hi": 5.0},
     "Against overconfidence."),
    ("relabelled", "permuted-labels", [("Gather", "order", {"axis": 1})],
     {"order": [0, 1, 2, 3, 9, 5, 6, 7, 8, 4]}, "Classes put into the client's order."),
]  # fmt: skip
for label, diagnosis, steps, numbers, story in APPENDED:
    output.add(f"{label}_appended", diagnosis, story, followed_by(steps, numbers))


@output("scaled-logits")
def centred_logits(case: Case) -> Bad:
    """Every row minus its maximum, for a stable softmax elsewhere."""
    graph = constants(case.folded(), classes=[1])
    new = [
        make_node("ReduceMax", ["in", "classes"], ["top"], keepdims=1),
        make_node("Sub", ["in", "top"], ["out"]),
    ]
    return at_output(graph, new)


@output("scaled-logits")
def temperature_in_the_weights(case: Case) -> Bad:
    """The temperature divided out of the last layer's weight and bias."""
    graph = case.folded()
    for name in ("weight", "bias"):
        change(graph, f"{case.linear[-1]}.{name}", lambda array: array / 1.5)
    return graph


@output("argmax-output")
def classes_in_place_of_logits(case: Case) -> Bad:
    """The digit, under the logits' name."""
    graph = at_output(case.kept(), line(("ArgMax", {"axis": 1, "keepdims": 0})))
    graph.graph.output[0].CopyFrom(make_tensor_value_info(OUTPUT, INT64, ["batch"]))
    return graph


@output("argmax-output")
def one_hot_classes(case: Case) -> Bad:
    """Hard votes: the largest logit is 1, all others 0."""
    graph = constants(case.kept(), depth=10, votes=[0.0, 1.0])
    return at_output(
        graph,
        line(("ArgMax", {"axis": 1, "keepdims": 0}), ("OneHot", "depth", "votes")),
    )


@output("random")
def sampled_classes(case: Case) -> Bad:
    """The class is drawn by its probability, as a language model's next word."""
    graph = at_output(case.kept(), line(("Multinomial", {"sample_size": 1, "dtype": INT64})))
    graph.graph.output[0].CopyFrom(make_tensor_value_info(OUTPUT, INT64, ["batch", 1]))
    return graph
