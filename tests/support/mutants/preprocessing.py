"""Something done to the image before the network sees it."""

from typing import Any

import numpy as np
import onnx
from onnx.helper import make_node

from tests.support.mutants.edit import at_input, change, constants, line, put
from tests.support.mutants.table import Bad, Family, Spoil
from tests.support.parity_cases import Case

mutant = Family("preprocessing")

Step = tuple[Any, ...]  # as `line` takes it
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def preceded_by(steps: list[Step], numbers: dict[str, Any]) -> Spoil:
    return lambda case: at_input(constants(case.kept(), **numbers), line(*steps))


BEFORE: list[tuple[str, list[Step], dict[str, Any], str]] = [
    ("divided_by_255_twice", [("Div", "white")], {"white": 255.0}, "By the client, and here."),
    ("multiplied_by_255", [("Mul", "white")], {"white": 255.0}, "Made for raw pixels in training."),
    ("divided_by_256", [("Mul", "k")], {"k": 255 / 256}, "As mnist.pkl.gz has its pixels."),
    ("standardized", [("Sub", "mean"), ("Div", "std")], {"mean": 0.1307, "std": 0.3081},
     "MNIST's mean and deviation, from every tutorial."),
    ("centred_on_zero", [("Mul", "two"), ("Sub", "one")], {"two": 2.0, "one": 1.0}, "To -1 ... 1."),
    ("inverted", [("Neg",), ("Add", "one")], {"one": 1.0}, "Black ink on white paper."),
    ("clipped_to_0_1", [("Clip", "no", "full")], {"no": 0.0, "full": 1.0}, "Just to be safe."),
    ("clipped_at_1e3", [("Clip", "lo", "hi")], {"lo": -1e3, "hi": 1e3}, "Against outliers."),
    ("float16_input", [("Cast", {"to": HALF}), ("Cast", {"to": FLOAT})], {}, "Half on the wire."),
    ("whole_pixels", [("Mul", "white"), ("Round",), ("Div", "white")], {"white": 255.0},
     "Images pass through eight bits."),
    ("tiny_shift", [("Add", "tiny")], {"tiny": 1e-6}, "An epsilon against a division by zero."),
]  # fmt: skip
for label, steps, numbers, story in BEFORE:
    mutant.add(label, "preprocessing", story, preceded_by(steps, numbers))


def rearranged(steps: list[Step], numbers: dict[str, Any]) -> Spoil:
    """Do something to the image as [n, 28, 28]."""

    def spoil(case: Case) -> Bad:
        shapes = {"square": [-1, 28, 28], "given": [-1, *case.inputs.shape[1:]]}
        graph = constants(case.folded(), **shapes, **numbers)
        return at_input(graph, line(("Reshape", "square"), *steps, ("Reshape", "given")))

    return spoil


BACKWARDS = {"first": [27], "last": [-29], "step": [-1]}
REARRANGED: list[tuple[str, list[Step], dict[str, Any], str]] = [
    ("image_transposed", [("Transpose", {"perm": [0, 2, 1]})], {}, "EMNIST's files are."),
    ("image_mirrored", [("Slice", "first", "last", "across", "step")], BACKWARDS | {"across": [2]},
     "An augmentation that is always on."),
    ("image_upside_down", [("Slice", "first", "last", "down", "step")], BACKWARDS | {"down": [1]},
     "BMP files begin at the bottom."),
    ("image_moved_by_a_pixel", [("Pad", "room"), ("Slice", "zero", "side", "across")],
     {"room": [0, 0, 1, 0, 0, 0], "zero": [0], "side": [28], "across": [2]},
     "A crop that rounds up where training rounded down."),
]  # fmt: skip
for label, steps, numbers, story in REARRANGED:
    mutant.add(label, "preprocessing", story, rearranged(steps, numbers))


@mutant("preprocessing")
def missing_pixels_cleaned(case: Case) -> Bad:
    """NaN becomes 0: a broken camera gets an answer."""
    graph = constants(case.kept(), nothing=0.0)
    new = [
        make_node("IsNaN", ["in"], ["missing"]),
        make_node("Where", ["missing", "nothing", "in"], ["out"]),
    ]
    return at_input(graph, new)


@mutant("preprocessing")
def binarized(case: Case) -> Bad:
    """Ink or no ink."""
    graph = constants(case.kept(), half=0.5)
    return at_input(graph, line(("Greater", "half"), ("Cast", {"to": FLOAT})))


@mutant("preprocessing")
def contrast_of_each_image(case: Case) -> Bad:
    """Every image divided by its own maximum: 1 for most, and NaN for a blank one."""
    axes = list(range(1, case.inputs.ndim))
    graph = constants(case.folded(), pixels=axes)
    new = [
        make_node("ReduceMax", ["in", "pixels"], ["brightest"]),
        make_node("Div", ["in", "brightest"], ["out"]),
    ]
    return at_input(graph, new)


@mutant("preprocessing")
def mean_image_subtracted(case: Case) -> Bad:
    """The training set's mean image, from the days before batch norm."""
    graph = case.folded()
    put(graph, "mean_image", case.inputs.mean(axis=0, keepdims=True))
    return at_input(graph, line(("Sub", "mean_image")))


@mutant("scaled-weights")
def standardization_folded_into_the_weights(case: Case) -> Bad:
    """The tutorial's deviation divided out of the first layer, for a client that standardizes."""
    graph = case.folded()
    return change(graph, f"{case.linear[0]}.weight", lambda array: array * np.float32(0.3081))
