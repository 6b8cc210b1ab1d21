"""Coverage: whether the probes have been on both sides of every kink of every unit.

If a unit of the ReLU family was never on, or never off, the file may compute anything there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_batchnorm.parity.error_model import (
    ALARM_SIGMAS,
    UncertainTensor,
    activate,
    kinks,
    normalization,
    operands,
)
from mnist_batchnorm.parity.layers import Layer

INPUT_LIMIT = 1e9  # largest input considered: 1000 times the largest probe
SEARCH_ROUNDS = 12
STRIDES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the search, relative to the norm of the input
MAX_SEARCHED_SIDES = 200
INPUTS_PER_SIDE = 4  # that the search returns


@dataclass(frozen=True)
class ActivationSide:
    """An interval (low, high) of a unit's input between two kinks of its activation function.

    The unit is the channel of a 2-D activation.
    """

    layer: str
    unit: int
    low: float
    high: float

    def __str__(self) -> str:
        where = f"below {self.high:g}" if self.low == -torch.inf else f"above {self.low:g}"
        return f"{self.layer}[{self.unit}] {where}"


class ActivationCoverage:
    """Records which sides of a network's units were entered, beyond rounding."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._entered: dict[str, Tensor] = {}  # bool [sides, units] of each activation

    def observe(self, layer: Layer, entering: UncertainTensor) -> None:
        """Record an activation's input; a callback of `propagate_errors`."""
        noise = ALARM_SIGMAS * entering.variance.sqrt()
        sides = [
            _units((entering.value - noise > low) & (entering.value + noise < high)).any(0)
            for low, high in _sides(layer.module)
        ]
        entered = torch.stack(sides)
        self._entered[layer.name] = self._entered.get(layer.name, False) | entered

    @property
    def units(self) -> int:
        """Number of observed units."""
        return sum(entered.shape[1] for entered in self._entered.values())

    @property
    def uncovered(self) -> list[ActivationSide]:
        """Sides that no input has entered."""
        return [
            ActivationSide(layer.name, unit, *_sides(layer.module)[side])
            for layer in self._layers
            if layer.name in self._entered
            for side, unit in (~self._entered[layer.name]).nonzero().tolist()
        ]


def _sides(module: nn.Module) -> list[tuple[float, float]]:
    _, ceiling = kinks(module, torch.zeros(1, 1))
    kink = [0.0] if ceiling == torch.inf else [0.0, ceiling]
    return list(zip([-torch.inf, *kink], [*kink, torch.inf], strict=True))


def _units(entering: Tensor) -> Tensor:
    """Flatten all positions of a unit into rows, ``[n, units]``."""
    return entering.movedim(1, -1).reshape(-1, entering.shape[1])


def find_inputs(layers: Sequence[Layer], sides: Sequence[ActivationSide], starts: Tensor) -> Tensor:
    """Search along gradients for inputs that enter sides of units, float32 ``[n, ...]``.

    Between kinks a network is linear, so each round tries strides of several lengths along the
    gradient of the unit's input, and continues from the best point. Returns the `INPUTS_PER_SIDE`
    inputs nearest to or furthest into each of the first `MAX_SEARCHED_SIDES` sides.
    """
    found = [starts[:0]]
    for side in sides[:MAX_SEARCHED_SIDES]:
        end = next(i for i, layer in enumerate(layers) if layer.name == side.layer)
        network = nn.Sequential(*(layer.module for layer in layers[:end]))
        points = starts
        for _ in range(SEARCH_ROUNDS):
            points = _advance(network, side, points)
        best = _depth(network, side, points).topk(min(INPUTS_PER_SIDE, len(points))).indices
        found.append(points[best])
    return torch.cat(found)


def _advance(network: nn.Sequential, side: ActivationSide, points: Tensor) -> Tensor:
    with torch.enable_grad():
        start = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_depth(network, side, start).sum(), start)
    direction = gradient.flatten(1)
    size = points.flatten(1).norm(dim=1).clamp(min=1) / direction.norm(dim=1).clamp(min=1e-30)
    stride = (direction * size[:, None]).reshape(points.shape)
    tried = torch.stack([points, *(points + length * stride for length in STRIDES)])
    tried = tried.clamp(-INPUT_LIMIT, INPUT_LIMIT)
    with torch.inference_mode():
        depth = torch.stack([_depth(network, side, candidates) for candidates in tried])
    best = depth.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argmax(0)
    return tried[best, torch.arange(len(points))]


def _depth(network: nn.Sequential, side: ActivationSide, points: Tensor) -> Tensor:
    """Return how far a unit's input lies inside a side, at most, ``[n]``."""
    entering = network(points)[:, side.unit].reshape(len(points), -1)
    return torch.minimum(entering - side.low, side.high - entering).amax(1)


@torch.inference_mode()
def unreachable_sides(
    layers: Sequence[Layer], shape: tuple[int, ...], sides: Sequence[ActivationSide]
) -> list[ActivationSide]:
    """Return the sides that no input within ±`INPUT_LIMIT` can enter, by interval arithmetic.

    Such a unit is dead or always linear in the checkpoint itself, as with gamma 0 or only negative
    weights, so the file's behavior on its other side does not matter.
    """
    ranges = dict(_ranges(layers, shape))
    return [
        side
        for side in sides
        if ranges[side.layer][0][side.unit] >= side.high
        or ranges[side.layer][1][side.unit] <= side.low
    ]


def _ranges(
    layers: Sequence[Layer], shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Bound the input of each activation: lowest and highest of each unit."""
    high = torch.full((1, *shape), INPUT_LIMIT, dtype=torch.float64)
    low = -high
    for layer in layers:
        match layer.module:
            case nn.Flatten() | nn.MaxPool2d() as module:
                low, high = module(low), module(high)
            case nn.BatchNorm1d() | nn.BatchNorm2d() as module:
                scale, mean, beta = normalization(module, low)
                ends = scale * (low - mean) + beta, scale * (high - mean) + beta
                low, high = torch.minimum(*ends), torch.maximum(*ends)
            case nn.Linear() | nn.Conv2d() | nn.AvgPool2d() | nn.AdaptiveAvgPool2d() as module:
                product, weight, bias, _ = operands(module, low)
                up, down = weight.clamp(min=0), weight.clamp(max=0)
                low, high = (
                    product(low, up) + product(high, down) + bias,
                    product(high, up) + product(low, down) + bias,
                )
            case module:
                yield layer.name, (_units(low).amin(0), _units(high).amax(0))
                zero = torch.zeros(()).clamp(
                    low, high
                )  # a leaky unit's minimum if its slope is negative
                candidates = torch.stack([activate(module, x) for x in (low, zero, high)])
                low, high = candidates.amin(0), candidates.amax(0)
