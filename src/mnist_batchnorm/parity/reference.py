"""The reference: exact outputs of the checkpoint's network on probe inputs, and their rounding."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnist_batchnorm.core.arrays import Float32, Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.threads import one_thread
from mnist_batchnorm.parity.coverage import (
    ActivationCoverage,
    ActivationSide,
    find_inputs,
    unreachable_sides,
)
from mnist_batchnorm.parity.error_model import propagate_errors
from mnist_batchnorm.parity.layers import Layer
from mnist_batchnorm.parity.report import finite
from mnist_batchnorm.parity.runtime import WrongOutputError

Labels = npt.NDArray[np.integer[Any]]

REAL = "real"
SAMPLE_SIZE = 500  # inputs of each random or rescaled family
MAX_ONE_HOT_POSITIONS = 4096
MAX_ONE_HOT_ELEMENTS = 2**25  # of all one-hot inputs: 128 MB
STARTS_PER_FAMILY = 8  # inputs from which the search for uncovered units starts


def probe_inputs(shape: tuple[int, ...], real: Float32 | None) -> dict[str, Float32]:
    """Return families of finite inputs that may reveal a difference, float32 ``[n, *shape]``.

    The real inputs; zeros, ones, normal and uniform inputs; real (or else uniform) inputs scaled to
    raw pixels 0 ... 255, by 1e6, and to denormals; 1e4 and -1e4 at one element, for every element
    or for as many, evenly spaced, as the limits allow.
    """
    size = int(np.prod(shape))
    generator = np.random.default_rng(0)
    uniform = generator.random((SAMPLE_SIZE, *shape))
    natural = uniform if real is None else real[:SAMPLE_SIZE].astype(np.float64)
    unit = natural / (np.abs(natural).max() or 1.0)
    positions = min(size, MAX_ONE_HOT_POSITIONS, max(1, MAX_ONE_HOT_ELEMENTS // (2 * size)))
    one_hot = np.zeros((2, positions, size), np.float32)
    one_hot[:, np.arange(positions), np.linspace(0, size - 1, positions).astype(int)] = [
        [1e4],
        [-1e4],
    ]
    families = {} if real is None else {REAL: real}
    families |= {
        "zeros": np.zeros((1, *shape), np.float32),
        "ones": np.ones((1, *shape), np.float32),
        "normal": generator.normal(size=(SAMPLE_SIZE, *shape)).astype(np.float32),
        "uniform": uniform.astype(np.float32),
        "raw pixels": np.rint(255 * unit).astype(np.float32),
        "times 1e6": (1e6 * natural).astype(np.float32),
        "denormal": (1e-39 * unit).astype(np.float32),
        "one-hot": one_hot.reshape(-1, *shape),
    }
    return families


def broken_inputs(natural: Float32) -> dict[str, Float32]:
    """Return non-finite inputs: NaN everywhere; NaN or infinities at four positions of four."""
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
    """Inputs of one kind with the network's outputs in eval mode.

    Attributes:
        name: family name.
        inputs: float32 ``[n, ...]``.
        exact: outputs in float64 arithmetic, ``[n, outputs]``.
        sigma: standard deviation of float32 rounding, float64 ``[n, outputs]``.
        bound: bound on float32 rounding, float64 ``[n, outputs]``.
        pytorch: PyTorch's float32 outputs, ``[n, outputs]``.
    """

    name: str
    inputs: Float32
    exact: Float64
    sigma: Float64
    bound: Float64
    pytorch: Float32

    @cached_property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Outputs that the error model covers: no float32 may overflow there."""
        known: npt.NDArray[np.bool_] = np.isfinite(self.exact) & np.isfinite(self.bound)
        return known & np.isfinite(self.sigma)

    @cached_property
    def size(self) -> Float64:
        """Largest absolute exact output of each row, ``[n]``."""
        largest: Float64 = np.abs(self.exact).max(axis=1)
        return np.maximum(largest, np.finfo(np.float32).tiny)

    def errors(self, outputs: Float32) -> Float64:
        """Return the absolute errors, ``[n, outputs]``; `LARGEST_ERROR` for NaN."""
        with np.errstate(all="ignore"):
            return finite(np.abs(outputs - self.exact))

    def sigmas(self, outputs: Float32) -> Float64:
        """Return `errors` in standard deviations of rounding; 0 for outputs not `judged`."""
        with np.errstate(all="ignore"):
            return np.where(self.judged, finite(self.errors(outputs) / self.sigma), 0.0)


class Reference:
    """What a network computes in eval mode, for comparison with any number of files.

    Args:
        model: float32 network on the CPU, in eval mode.
        layers: its layers; empty if it has unsupported ones. Then there is no error model.
        input_shape: shape of one input, without the batch axis.
        inputs: real inputs, float32 ``[n, *input_shape]``; None to use synthetic inputs alone.
        labels: classes of the inputs, integers ``[n]``.

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
        """Every family of finite inputs by name."""
        return self._probed[0]

    @property
    def natural(self) -> Family:
        """The real inputs or, without any, the normal ones."""
        return self.families[REAL if self._inputs is not None else "normal"]

    @property
    def units(self) -> int:
        """Number of units of the ReLU family."""
        return self._probed[1].units

    @property
    def uncovered_sides(self) -> list[ActivationSide]:
        """Sides of units that some input may enter, but no probe does."""
        return [side for side in self._probed[1].uncovered if side not in self.unreachable_sides]

    @cached_property
    def unreachable_sides(self) -> list[ActivationSide]:
        """Sides of units that no input can enter."""
        return unreachable_sides(self.layers, self.input_shape, self._probed[1].uncovered)

    @cached_property
    def _probed(self) -> tuple[dict[str, Family], ActivationCoverage]:
        coverage = ActivationCoverage(self.layers)
        inputs = probe_inputs(self.input_shape, self._inputs)
        families = {name: self._family(name, rows, coverage) for name, rows in inputs.items()}
        if uncovered := coverage.uncovered:
            kinds = [rows for name, rows in inputs.items() if name not in {"times 1e6", "denormal"}]
            starts = np.concatenate(
                [rows[:: max(1, len(rows) // STARTS_PER_FAMILY)] for rows in kinds]
            )
            found = find_inputs(self.layers, uncovered, torch.from_numpy(starts)).numpy()
            families["directed"] = self._family("directed", found, coverage)
        return families, coverage

    @cached_property
    def broken(self) -> dict[str, tuple[Float32, Float32]]:
        """Non-finite inputs with PyTorch's outputs, ``[n, outputs]``, by kind."""
        inputs = broken_inputs(self.natural.inputs)
        if not self.layers:
            inputs = {}
        elif any(isinstance(layer.module, nn.MaxPool2d) for layer in self.layers):
            # PyTorch's maximum of NaN and a number is NaN, that of ONNX Runtime 1.32 either
            inputs = {"all NaN": inputs["all NaN"]}
        return {
            name: (rows, self._pytorch(rows).reshape(len(rows), -1))
            for name, rows in inputs.items()
        }

    @cached_property
    def work(self) -> int:
        """Approximate multiply-adds per input."""
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

    def flatten(self, output: npt.NDArray[Any]) -> Float32:
        """Flatten a file's output to float32 ``[n, outputs]``.

        Raises:
            WrongOutputError: Its type or shape is not that of the network's output.
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

    def _family(self, name: str, inputs: Float32, coverage: ActivationCoverage) -> Family:
        tensor = torch.from_numpy(inputs)
        with torch.inference_mode(), one_thread():
            if self.layers:
                signal = propagate_errors(self.layers, tensor, coverage.observe)
                answers = [signal.value, signal.variance.sqrt(), signal.bound]
            else:
                exact = copy.deepcopy(self.model).double()(tensor.double())
                answers = [exact, *(torch.full_like(exact, torch.nan) for _ in range(2))]
        exact, sigma, bound = (answer.reshape(len(inputs), -1).numpy() for answer in answers)
        pytorch = self._pytorch(inputs).reshape(len(inputs), -1)
        return Family(name, inputs, exact, sigma, bound, pytorch)


def _checked(inputs: Float32, labels: Labels | None, shape: tuple[int, ...]) -> Float32:
    if inputs.shape[1:] != shape or not len(inputs):
        expected = ", ".join(map(str, ("n", *shape)))
        raise UserError(f"the inputs have shape {list(inputs.shape)}, expected [{expected}], n > 0")
    if inputs.dtype != np.float32:
        raise UserError(f"the inputs are {inputs.dtype}, expected float32")
    if not np.isfinite(inputs).all():
        row = int(np.argmin(np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)))
        raise UserError(f"the inputs hold NaN or infinity, first in row {row}")
    if labels is not None and (labels.shape != (len(inputs),) or labels.dtype.kind not in "iu"):
        held = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"the labels are {held}, expected integers [{len(inputs)}]")
    return np.ascontiguousarray(inputs)
