"""Have the probes been on both sides of every kink of every unit?

A unit of the ReLU family that was never on, or never off, may be anything on the other side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_batchnorm.parity.bounds import ALARM, Signal, activate, kinks, normalization, operands
from mnist_batchnorm.parity.layers import Layer

LARGEST_INPUT = 1e9  # of the inputs that could exercise a unit: 1000 times the largest probe
ROUNDS, STRIDES = 12, (0.01, 0.1, 1.0, 10.0, 100.0)  # of the search; strides in input sizes
SEARCHED = 200  # sides at most
FOUND = 4  # inputs that the search keeps for a side


@dataclass(frozen=True)
class Side:
    """A stretch of a unit's input between two kinks of its function.

    Attributes:
        layer: the activation.
        unit: of a 2-D activation the channel.
        low: where the stretch begins.
        high: where it ends.
    """

    layer: str
    unit: int
    low: float
    high: float

    def __str__(self) -> str:
        where = f"below {self.high:g}" if self.low == -torch.inf else f"above {self.low:g}"
        return f"{self.layer}[{self.unit}] {where}"


class Exercise:
    """Which sides of the units of a network have been entered, further than noise reaches.

    Args:
        layers: of the network.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._entered: dict[str, Tensor] = {}  # bool [sides, units] of each activation

    def observe(self, layer: Layer, entering: Signal) -> None:
        """Note what enters an activation, as `propagate` tells it."""
        noise = ALARM * entering.variance.sqrt()
        sides = [
            _units((entering.value - noise > low) & (entering.value + noise < high)).any(0)
            for low, high in _sides(layer.module)
        ]
        entered = torch.stack(sides)
        self._entered[layer.name] = self._entered.get(layer.name, False) | entered

    @property
    def units(self) -> int:
        """How many units the network has."""
        return sum(entered.shape[1] for entered in self._entered.values())

    @property
    def missing(self) -> list[Side]:
        """The sides that no input has entered."""
        return [
            Side(layer.name, unit, *_sides(layer.module)[side])
            for layer in self._layers
            if layer.name in self._entered
            for side, unit in (~self._entered[layer.name]).nonzero().tolist()
        ]


def _sides(module: nn.Module) -> list[tuple[float, float]]:
    _, ceiling = kinks(module, torch.zeros(1, 1))
    kink = [0.0] if ceiling == torch.inf else [0.0, ceiling]
    return list(zip([-torch.inf, *kink], [*kink, torch.inf], strict=True))


def _units(entering: Tensor) -> Tensor:
    """Bring all places of a unit to the rows, ``[..., units]``."""
    return entering.movedim(1, -1).reshape(-1, entering.shape[1])


def search(layers: Sequence[Layer], sides: Sequence[Side], starts: Tensor) -> Tensor:
    """Look for inputs that enter sides of units, along gradients.

    Between kinks a network is linear, so a ray along the gradient of a unit's input is tried in
    strides of every size, and the best point is the next start.

    Args:
        layers: of the network.
        sides: to be entered; the first `SEARCHED` are looked for.
        starts: float32 ``[n, ...]``.

    Returns:
        The `FOUND` inputs nearest to or furthest into each side, float32.
    """
    found = [starts[:0]]
    for side in sides[:SEARCHED]:
        end = next(i for i, layer in enumerate(layers) if layer.name == side.layer)
        network = nn.Sequential(*(layer.module for layer in layers[:end]))
        points = starts
        for _ in range(ROUNDS):
            points = _advance(network, side, points)
        best = _depth(network, side, points).topk(min(FOUND, len(points))).indices
        found.append(points[best])
    return torch.cat(found)


def _advance(network: nn.Sequential, side: Side, points: Tensor) -> Tensor:
    with torch.enable_grad():
        start = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_depth(network, side, start).sum(), start)
    direction = gradient.flatten(1)
    size = points.flatten(1).norm(dim=1).clamp(min=1) / direction.norm(dim=1).clamp(min=1e-30)
    stride = (direction * size[:, None]).reshape(points.shape)
    tried = torch.stack([points, *(points + length * stride for length in STRIDES)])
    tried = tried.clamp(-LARGEST_INPUT, LARGEST_INPUT)
    with torch.inference_mode():
        depth = torch.stack([_depth(network, side, candidates) for candidates in tried])
    best = depth.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argmax(0)
    return tried[best, torch.arange(len(points))]


def _depth(network: nn.Sequential, side: Side, points: Tensor) -> Tensor:
    """How far into a side a unit's input lies, where it lies deepest, ``[n]``."""
    entering = network(points)[:, side.unit].reshape(len(points), -1)
    return torch.minimum(entering - side.low, side.high - entering).amax(1)


@torch.inference_mode()
def unreachable(
    layers: Sequence[Layer], shape: tuple[int, ...], sides: Sequence[Side]
) -> list[Side]:
    """Tell which sides no input within ±`LARGEST_INPUT` can enter, by interval arithmetic.

    Such a unit is dead or always linear in the checkpoint itself, as with gamma 0 or only negative
    weights: what the file makes of its other side is never seen.
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
    """Bound what enters each activation: least and largest of each unit."""
    high = torch.full((1, *shape), LARGEST_INPUT, dtype=torch.float64)
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
                zero = torch.zeros(()).clamp(low, high)  # where a unit that falls both ways turns
                given = torch.stack([activate(module, x) for x in (low, zero, high)])
                low, high = given.amin(0), given.amax(0)
