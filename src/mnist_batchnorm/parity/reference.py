"""What the checkpoint's network computes, and how sure that is, for inputs of every kind."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.threads import one_thread
from mnist_batchnorm.parity.bounds import propagate
from mnist_batchnorm.parity.exercise import Exercise, Side, search, unreachable
from mnist_batchnorm.parity.layers import Layer
from mnist_batchnorm.parity.report import finite
from mnist_batchnorm.parity.runtime import Float32, WrongOutputError

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.integer[Any]]

REAL = "real"
SAMPLE = 500  # inputs of each random or rescaled family
ONE_HOT = 4096  # elements probed one by one, at most
ONE_HOT_NUMBERS = 2**25  # in all one-hot inputs, at most: 128 MB
STARTS = 8  # inputs of each family from which the search for others starts


def probe_inputs(shape: tuple[int, ...], real: Float32 | None) -> dict[str, Float32]:
    """Make finite inputs of every kind that may show a difference.

    Args:
        shape: of one input, without the batch axis.
        real: inputs as the network meets them, ``[n, *shape]``; None where there are none.

    Returns:
        Families by name, float32 ``[n, *shape]`` each: the real ones; zeros, ones, normal and
        uniform ones; real ones (or else uniform ones) stretched to raw pixels 0 ... 255, times
        1e6, and shrunk to denormals; 1e4 and -1e4 at one element, for each element or for as many,
        evenly spread, as `ONE_HOT` and `ONE_HOT_NUMBERS` allow.
    """
    size = int(np.prod(shape))
    generator = np.random.default_rng(0)
    uniform = generator.random((SAMPLE, *shape))
    natural = uniform if real is None else real[:SAMPLE].astype(np.float64)
    unit = natural / (np.abs(natural).max() or 1.0)
    places = min(size, ONE_HOT, max(1, ONE_HOT_NUMBERS // (2 * size)))
    one_hot = np.zeros((2, places, size), np.float32)
    one_hot[:, np.arange(places), np.linspace(0, size - 1, places).astype(int)] = [[1e4], [-1e4]]
    families = {} if real is None else {REAL: real}
    families |= {
        "zeros": np.zeros((1, *shape), np.float32),
        "ones": np.ones((1, *shape), np.float32),
        "normal": generator.normal(size=(SAMPLE, *shape)).astype(np.float32),
        "uniform": uniform.astype(np.float32),
        "raw pixels": np.rint(255 * unit).astype(np.float32),
        "times 1e6": (1e6 * natural).astype(np.float32),
        "denormal": (1e-39 * unit).astype(np.float32),
        "one-hot": one_hot.reshape(-1, *shape),
    }
    return families


def broken_inputs(natural: Float32) -> dict[str, Float32]:
    """Make inputs that are not finite from the first of some that are, by what is wrong.

    At four places of four inputs: NaN, infinity, minus infinity, both; and NaN everywhere.
    """
    rows = np.resize(natural, (4, *natural.shape[1:]))
    flat = rows.reshape(4, -1)
    at = np.linspace(0, flat.shape[1] - 1, 4).astype(int)
    broken = {"all NaN": np.full_like(rows[:1], np.nan)}
    for name, (here, next_) in {
        "NaN": (np.nan, None),
        "+Inf": (np.inf, None),
        "-Inf": (-np.inf, None),
        "+Inf and -Inf": (np.inf, -np.inf),
    }.items():
        changed = flat.copy()
        changed[range(4), at] = here
        if next_ is not None:
            changed[range(4), (at + 1) % flat.shape[1]] = next_
        broken[name] = changed.reshape(rows.shape)
    return broken


@dataclass(frozen=True)
class Family:
    """Inputs of one kind, and what the network makes of them in eval mode.

    Attributes:
        name: of the kind.
        inputs: float32 ``[n, ...]``.
        exact: float64 ``[n, outputs]``, of float64 arithmetic.
        sigma: float64 ``[n, outputs]``, standard deviation of float32 rounding.
        bound: float64 ``[n, outputs]``, which float32 rounding cannot exceed.
        pytorch: float32 ``[n, outputs]``, of PyTorch's own float32.
    """

    name: str
    inputs: Float32
    exact: Float64
    sigma: Float64
    bound: Float64
    pytorch: Float32

    @cached_property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Which outputs the error model tells something about: no float32 may overflow there."""
        known: npt.NDArray[np.bool_] = np.isfinite(self.exact) & np.isfinite(self.bound)
        return known & np.isfinite(self.sigma)

    @cached_property
    def size(self) -> Float64:
        """Each row's largest exact output, ``[n]``."""
        largest: Float64 = np.abs(self.exact).max(axis=1)
        return np.maximum(largest, np.finfo(np.float32).tiny)

    def errors(self, outputs: Float32) -> Float64:
        """Return how far outputs lie from exact ones, ``[n, outputs]``; NaN is `LARGEST`."""
        with np.errstate(all="ignore"):
            return finite(np.abs(outputs - self.exact))

    def sigmas(self, outputs: Float32) -> Float64:
        """Return `errors` in standard deviations of rounding; 0 where nothing can be judged."""
        with np.errstate(all="ignore"):
            return np.where(self.judged, finite(self.errors(outputs) / self.sigma), 0.0)


class Reference:
    """What a network computes in eval mode; made once, compared with any number of files.

    Args:
        model: the network, float32, on the CPU, in eval mode.
        layers: it, layer by layer; empty when it has layers that the gate does not know. Then
            there is no error model, and all that can be compared is float64 and bits.
        input_shape: of one input, without the batch axis.
        inputs: real inputs, float32 ``[n, *input_shape]``; None to judge by synthetic ones alone.
        labels: their classes, integers ``[n]``.

    Raises:
        UserError: The inputs or labels do not fit, or are not finite.
    """

    def __init__(
        self,
        model: nn.Sequential,
        layers: Sequence[Layer],
        input_shape: tuple[int, ...],
        inputs: Float32 | None = None,
        labels: Labels | None = None,
    ) -> None:
        if inputs is not None:
            inputs = _checked(inputs, labels, input_shape)
        elif labels is not None:
            raise UserError("labels are given, but no inputs that they belong to")
        self.model = model
        self.layers = layers
        self.input_shape = input_shape
        self.labels = labels
        self._inputs = inputs
        self.output_shape = tuple(self._pytorch(np.zeros((1, *input_shape), np.float32)).shape[1:])

    @property
    def families(self) -> dict[str, Family]:
        """Every kind of finite inputs, and what the network makes of them."""
        return self._probed[0]

    @property
    def natural(self) -> Family:
        """The real inputs or, where there are none, normal ones."""
        return self.families[REAL if self._inputs is not None else "normal"]

    @property
    def units(self) -> int:
        """How many units of the ReLU family the network has."""
        return self._probed[1].units

    @property
    def unexercised(self) -> list[Side]:
        """Sides of units that some input may enter, but none of the families does."""
        return [side for side in self._probed[1].missing if side not in self.out_of_reach]

    @cached_property
    def out_of_reach(self) -> list[Side]:
        """Sides of units that no input can enter."""
        return unreachable(self.layers, self.input_shape, self._probed[1].missing)

    @cached_property
    def _probed(self) -> tuple[dict[str, Family], Exercise]:
        exercise = Exercise(self.layers)
        inputs = probe_inputs(self.input_shape, self._inputs)
        families = {name: self._family(name, rows, exercise) for name, rows in inputs.items()}
        if missing := exercise.missing:
            kinds = [rows for name, rows in inputs.items() if name not in {"times 1e6", "denormal"}]
            starts = np.concatenate([rows[:: max(1, len(rows) // STARTS)] for rows in kinds])
            found = search(self.layers, missing, torch.from_numpy(starts)).numpy()
            families["directed"] = self._family("directed", found, exercise)
        return families, exercise

    @cached_property
    def broken(self) -> dict[str, tuple[Float32, Float32]]:
        """Inputs that are not finite with PyTorch's outputs, ``[n, outputs]``, by what is wrong.

        With max pooling only inputs that are NaN throughout: PyTorch's maximum of NaN and a number
        is NaN, that of ONNX Runtime 1.32 may be either. None where the gate knows too little.
        """
        inputs = broken_inputs(self.natural.inputs)
        if not self.layers:
            inputs = {}
        elif any(isinstance(layer.module, nn.MaxPool2d) for layer in self.layers):
            inputs = {"all NaN": inputs["all NaN"]}
        return {
            name: (rows, self._pytorch(rows).reshape(len(rows), -1))
            for name, rows in inputs.items()
        }

    @cached_property
    def work(self) -> int:
        """How many multiply-adds one input takes, about."""
        counts = []

        def count(module: nn.Module, _: Any, output: Any) -> None:
            weight = getattr(module, "weight", None)
            terms = weight[0].numel() if isinstance(weight, Tensor) and weight.dim() > 1 else 1
            counts.append(terms * output.numel() if isinstance(output, Tensor) else 0)

        leaves = [module for module in self.model.modules() if not [*module.children()]]
        handles = [module.register_forward_hook(count) for module in leaves]
        try:
            self._pytorch(np.zeros((1, *self.input_shape), np.float32))
        finally:
            for handle in handles:
                handle.remove()
        return max(1, sum(counts))

    def rows(self, output: npt.NDArray[Any]) -> Float32:
        """Return a file's output as float32 ``[n, outputs]``.

        Raises:
            WrongOutputError: It has another type or shape than the network's.
        """
        if output.dtype != np.float32 or output.shape[1:] != self.output_shape:
            got, expected = (
                ", ".join(map(str, ("n", *shape)))
                for shape in (output.shape[1:], self.output_shape)
            )
            raise WrongOutputError(f"gives {output.dtype} [{got}], expected float32 [{expected}]")
        return output.reshape(len(output), int(np.prod(self.output_shape)))

    def _pytorch(self, inputs: Float32) -> Float32:
        with torch.inference_mode(), one_thread():
            outputs: Float32 = self.model(torch.from_numpy(inputs)).numpy()
        return outputs

    def _family(self, name: str, inputs: Float32, exercise: Exercise) -> Family:
        tensor = torch.from_numpy(inputs)
        with torch.inference_mode(), one_thread():
            if self.layers:
                signal = propagate(self.layers, tensor, exercise.observe)
                answers = [signal.value, signal.variance.sqrt(), signal.bound]
            else:
                exact = copy.deepcopy(self.model).double()(tensor.double())
                answers = [exact, *(torch.full_like(exact, torch.nan) for _ in range(2))]
        exact, sigma, bound = (answer.reshape(len(inputs), -1).numpy() for answer in answers)
        pytorch = self._pytorch(inputs).reshape(len(inputs), -1)
        return Family(name, inputs, exact, sigma, bound, pytorch)


def _checked(inputs: Float32, labels: Labels | None, shape: tuple[int, ...]) -> Float32:
    if inputs.shape[1:] != shape or not len(inputs):
        wanted = ", ".join(map(str, ("n", *shape)))
        raise UserError(f"the inputs have shape {list(inputs.shape)}, expected [{wanted}], n > 0")
    if inputs.dtype != np.float32:
        raise UserError(f"the inputs are {inputs.dtype}, expected float32")
    if not np.isfinite(inputs).all():
        row = int(np.argmin(np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)))
        raise UserError(f"the inputs hold NaN or infinity, first in row {row}")
    if labels is not None and (labels.shape != (len(inputs),) or labels.dtype.kind not in "iu"):
        held = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"the labels are {held}, expected integers [{len(inputs)}]")
    return np.ascontiguousarray(inputs)
