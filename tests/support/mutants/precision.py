"""Numbers, or sums, of less than single precision."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
from ml_dtypes import bfloat16, float8_e4m3fn
from onnx.helper import make_node

from tests.support.mutants.edit import (
    Array,
    after,
    at_input,
    at_output,
    change,
    constants,
    drop_unused,
    every_number,
    every_weight,
    in_place_of,
    line,
    nodes,
    numbers,
    put,
    tensor,
    weight_names,
    writer,
)
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import OUTPUT, Case

mutant = Family("precision")
quantized = Family("quantization")

FLOAT, HALF, BFLOAT = (onnx.TensorProto.DataType.Value(n) for n in ("FLOAT", "FLOAT16", "BFLOAT16"))


def through(dtype: type) -> Callable[[Array], Array]:
    return lambda array: array.astype(dtype).astype(np.float32)


def tf32(array: Array) -> Array:
    """Keep ten bits of the mantissa, rounded to nearest, as tensor cores read their operands."""
    bits = (array.view(np.uint32).astype(np.int64) + 0x1000) & 0xFFFFE000
    return bits.astype(np.uint32).view(np.float32)


def digits(count: int) -> Callable[[Array], Array]:
    """Round to significant decimal digits, as text does."""
    return np.vectorize(lambda value: float(f"{value:.{count - 1}e}"))


def rounded(case: Case, how: Callable[[Array], Array], folded: bool = False) -> Bad:
    return every_number(case.folded() if folded else case.kept(), how)


ROUNDED: list[tuple[str, str, Callable[[Array], Array], str]] = [
    ("float16", "float16", through(np.float16), "Stored as half to save space, cast back to load."),
    ("bfloat16", "bfloat16", through(bfloat16), "Saved from a mixed-precision run's working copy."),
    ("tf32", "tf32", tf32, "Weights dumped from a tensor-core kernel's operands."),
    ("decimals_4", "rounded-decimals", lambda a: np.round(a, 4), "np.savetxt with %.4f."),
    ("digits_6", "rounded-decimals", digits(6), "C's %g, and a JSON library's default."),
    ("digits_8", "rounded-decimals", digits(8), "One digit short of what float32 needs."),
]
for label, diagnosis, how, story in ROUNDED:
    mutant.add(label, diagnosis, story, partial(rounded, how=how))
    mutant.add(f"{label}_folded", diagnosis, story, partial(rounded, how=how, folded=True))


@mutant("float16")
def one_layer_float16(case: Case) -> Bad:
    """Mixed precision, where one layer was judged safe."""
    return change(case.kept(), case.largest, through(np.float16))


@mutant("float16")
def statistics_float16(case: Case) -> Bad:
    """model.half() and model.float() around the batch norms only."""
    graph = case.kept()
    for key in ("running_mean", "running_var"):
        change(graph, f"bn1.{key}", through(np.float16))
    return graph


@mutant("float16")
def stored_as_float16(case: Case) -> Bad:
    """Half-precision initializers that a Cast widens at start-up."""
    graph = case.folded()
    for name in weight_names(graph):
        put(graph, f"{name}.half", numbers(graph, name).astype(np.float16))
        tensor(graph, name).name = f"{name}.single"
        graph.graph.node.insert(0, make_node("Cast", [f"{name}.half"], [name], to=FLOAT))
    return drop_unused(graph)


def activations_through(case: Case, element: int) -> Bad:
    graph = case.kept()
    new = line(("Cast", {"to": element}), ("Cast", {"to": FLOAT}))
    return after(graph, nodes(graph, "Relu")[0], new)


mutant.add(
    "activations_float16",
    "float16",
    "A cast that mixed precision put between two layers, and its way back.",
    partial(activations_through, element=HALF),
)
mutant.add(
    "activations_bfloat16",
    "bfloat16",
    "The same of a TPU.",
    partial(activations_through, element=BFLOAT),
)


@mutant("float16")
def computed_in_float16(case: Case) -> Bad:
    """The whole network converted with keep_io_types=True: it looks float32 from outside."""
    graph = case.folded()
    for stored in list(graph.graph.initializer):
        if stored.data_type == FLOAT:
            put(graph, stored.name, numbers(graph, stored.name).astype(np.float16))
    at_input(graph, line(("Cast", {"to": HALF})))
    return at_output(graph, line(("Cast", {"to": FLOAT})))


# --- fewer bits ---------------------------------------------------------------------------------


def integers(array: Array, bits: int, channels: bool = False) -> tuple[Array, Array]:
    """Symmetric quantization: whole numbers, and the scale of the tensor or of each row."""
    axes = tuple(range(1, array.ndim)) if channels else None
    top = np.abs(array).max(axis=axes, keepdims=channels)
    scale = (top / (2 ** (bits - 1) - 1)).astype(np.float32)
    return np.round(array / scale), scale


def fake(array: Array, bits: int, channels: bool = False) -> Array:
    whole, scale = integers(array, bits, channels)
    return whole * scale


def palette(array: Array) -> Array:
    """The nearest of sixteen values, evenly spread over the sorted weights."""
    values = np.quantile(array, (np.arange(16) + 0.5) / 16)
    return np.asarray(values[np.abs(array[..., None] - values).argmin(-1)])


def weights_through(case: Case, how: Callable[[Array], Array]) -> Bad:
    return every_weight(case.folded(), how)


FEWER_BITS: list[tuple[str, Callable[[Array], Array], str]] = [
    ("int8", partial(fake, bits=8), "Fake quantization from quantization-aware training."),
    ("int8_by_channel", partial(fake, bits=8, channels=True), "The same, a scale a unit."),
    ("int4", partial(fake, bits=4, channels=True), "Four bits a weight."),
    ("binary", lambda a: np.sign(a) * np.abs(a).mean(), "Signs times their mean size."),
    ("float8", through(float8_e4m3fn), "Eight-bit floats, E4M3."),
    ("palette", palette, "Sixteen clusters of weights, as Core ML's palettization."),
]
for label, how, story in FEWER_BITS:
    quantized.add(label, "quantized", story, partial(weights_through, how=how))


@quantized("quantized")
def weights_only(case: Case) -> Bad:
    """The largest weight is stored as int8, which a DequantizeLinear node gives back."""
    graph = case.folded()
    whole, scale = integers(numbers(graph, case.largest), 8)
    tensor(graph, case.largest).name = "single"
    put(graph, "whole", whole.astype(np.int8))
    put(graph, "scale", scale)
    node = make_node("DequantizeLinear", ["whole", "scale"], [case.largest])
    graph.graph.node.insert(0, node)
    return drop_unused(graph)


@quantized("quantized")
def static(case: Case) -> Bad:
    """QuantizeLinear and DequantizeLinear around an activation, calibrated on a few images."""
    graph = case.folded()
    constants(graph, step=0.05)
    put(graph, "zero", np.uint8(0))
    new = line(("QuantizeLinear", "step", "zero"), ("DequantizeLinear", "step", "zero"))
    return after(graph, nodes(graph, "Relu")[0], new)


@quantized("quantized")
def dynamic(case: Case) -> Bad:
    """quantize_dynamic: the last layer in int8, its input's range taken from the whole batch."""
    graph = case.folded()
    last = writer(graph, OUTPUT)
    whole, scale = integers(numbers(graph, last.input[1]).T, 8)
    put(graph, "whole", whole.astype(np.int8))
    put(graph, "scale", scale)
    new = [
        make_node("DynamicQuantizeLinear", ["in"], ["bytes", "step", "zero"]),
        make_node("MatMulInteger", ["bytes", "whole", "zero"], ["sums"]),
        make_node("Cast", ["sums"], ["floats"], to=FLOAT),
        make_node("Mul", ["step", "scale"], ["unit"]),
        make_node("Mul", ["floats", "unit"], ["product"]),
        make_node("Add", ["product", last.input[2]], ["out"]),
    ]
    return in_place_of(graph, last, new)


@quantized("quantized")
def eight_bit_input(case: Case) -> Bad:
    """Inputs go through 256 levels: lossless for pixels, not for anything else."""
    graph = constants(case.kept(), step=1 / 255)
    put(graph, "zero", np.uint8(0))
    return at_input(
        graph, line(("QuantizeLinear", "step", "zero"), ("DequantizeLinear", "step", "zero"))
    )
