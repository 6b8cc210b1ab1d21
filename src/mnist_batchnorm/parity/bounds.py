"""How far may rounding honestly carry float32 arithmetic from the exact result?

Two answers for every element that a layer gives, against float64 arithmetic:

- `Signal.variance`, what rounding does. A rounding to nearest has a relative error within the unit
  roundoff u = 2^-24, taken as uniform, hence of variance u^2/3, and independent of the others (the
  model of Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis"). Variances
  of independent errors add, so they pass a layer by W^2 where a worst case passes by |W|. The
  errors that enter a layer are not independent where they come from one rounding further back,
  which reaches an output on many ways at once; so the outputs' variance is, where it is larger,
  the sum over all roundings of the square of the derivative by each (`_by_all_ways`). What lies
  beyond `ALARM` standard deviations is no rounding.
- `Signal.bound`, what rounding can do. k roundings change a number by a factor within
  1 +- gamma_k, gamma_k = k u / (1 - k u) (Higham 2002, "Accuracy and Stability of Numerical
  Algorithms", lemma 3.1), in whatever order sums are taken, with or without fused multiply-add. It
  assumes nothing and is about 1000 times larger.

Batch norm in eval mode is y = s (z - mean) + beta, s = gamma / sqrt(var + eps) (Ioffe & Szegedy
2015, algorithm 2). An honest file keeps it, and runtimes compute s z + (beta - s mean); or folds it
into the layer before, whose weights become s W and bias s (b - mean) + beta. Both answers hold for
both files: `_affine` takes the two layers as one and counts what either way rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import Tensor, nn

from mnist_batchnorm.parity.layers import Layer

ROUNDOFF = 2.0**-24  # u: half the spacing of the float32 numbers just above 1
UNDERFLOW = 2.0**-150  # half the spacing of the float32 numbers around 0
OVERFLOW = torch.finfo(torch.float32).max
ALARM = 8  # standard deviations
OUTPUTS = 256  # at most, for `_by_all_ways`, which goes back through the network once for each
ELEMENTS = 2**18  # of a chunk of inputs, 2 MB: what belongs to a chunk stays in the cache

Product = Callable[[Tensor, Tensor], Tensor]  # of inputs and weights: sums of their products
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Pooling = nn.AvgPool2d | nn.AdaptiveAvgPool2d


@dataclass(frozen=True)
class Signal:
    """What lies between two layers, for each input of a batch; float64, all of one shape.

    Attributes:
        value: exact.
        variance: of the rounding error that float32 arithmetic has gathered so far.
        bound: on the absolute value of that error. Infinity or NaN, in both, where a float32
            may have overflowed, so that nothing can be said.
    """

    value: Tensor
    variance: Tensor
    bound: Tensor


Observe = Callable[[Layer, Signal], None]


@torch.inference_mode()
def propagate(
    layers: Sequence[Layer], inputs: Tensor, observe: Observe = lambda layer, entering: None
) -> Signal:
    """Carry inputs, and the rounding errors made on the way, through a network in eval mode.

    Args:
        layers: float32 layers that the gate knows.
        inputs: float32 ``[n, ...]``, n > 0, finite.
        observe: called with each activation and what enters it, for some of the inputs at a time.

    Returns:
        What the last layer gives.
    """
    rows = max(1, ELEMENTS // inputs[0].numel())
    with torch.inference_mode(False):  # whose tensors have no derivatives
        exact = [deepcopy(layer.module).double().requires_grad_(False).eval() for layer in layers]
    chunks = []
    for chunk in torch.split(inputs.double(), rows):
        fresh: dict[int, Tensor] = {}
        signal = _propagate(layers, chunk, observe, fresh)
        if fresh and signal.value.flatten(1).shape[1] <= OUTPUTS:
            variance = _by_all_ways(exact, chunk, fresh)
            signal = replace(signal, variance=torch.fmax(signal.variance, variance))
        chunks.append(signal)
    return Signal(
        torch.cat([chunk.value for chunk in chunks]),
        torch.cat([chunk.variance for chunk in chunks]),
        torch.cat([chunk.bound for chunk in chunks]),
    )


def _by_all_ways(exact: Sequence[nn.Module], inputs: Tensor, fresh: Mapping[int, Tensor]) -> Tensor:
    """Return the outputs' variance where each rounding reaches them on all its ways at once.

    Args:
        exact: the layers, float64.
        inputs: float64 ``[n, ...]``.
        fresh: variance of what is rounded in a layer, to its output, by the layer's index.
    """
    added = []
    with torch.inference_mode(False), torch.enable_grad():
        value = inputs.clone()
        for index, module in enumerate(exact):
            value = module(value)
            if index in fresh:
                added.append(torch.zeros_like(value, requires_grad=True))
                value = value + added[-1]
        outputs = value.flatten(1)
        variance = torch.zeros_like(outputs)
        for output in range(outputs.shape[1]):
            ways = torch.autograd.grad(outputs[:, output].sum(), added, retain_graph=True)
            for way, rounded in zip(ways, fresh.values(), strict=True):
                variance[:, output] += (way**2 * rounded.clone()).flatten(1).sum(1)
    return variance.detach().view_as(value)


def _propagate(
    layers: Sequence[Layer], inputs: Tensor, observe: Observe, fresh: dict[int, Tensor]
) -> Signal:
    signal = Signal(inputs, torch.zeros_like(inputs), torch.zeros_like(inputs))
    before: nn.Module | None = None
    after = [layer.module for layer in layers[1:]] + [None]
    for index, (layer, following) in enumerate(zip(layers, after, strict=True)):
        match layer.module:
            case nn.Linear() | nn.Conv2d() as module:
                norm = following if isinstance(following, BatchNorm) else None
                signal, fresh[index + (norm is not None)] = _affine(signal, module, norm)
            case nn.BatchNorm1d() | nn.BatchNorm2d() as module:
                if not isinstance(before, nn.Linear | nn.Conv2d):  # else it is done already
                    signal, fresh[index] = _affine(signal, module, module)
            case nn.AvgPool2d() | nn.AdaptiveAvgPool2d() as module:
                signal, fresh[index] = _affine(signal, module, None)
            case nn.Flatten() | nn.MaxPool2d() as module:
                # a maximum is off by no more than what is off most in its window
                signal = Signal(*map(module, (signal.value, signal.variance, signal.bound)))
            case module:
                observe(layer, signal)
                signal, fresh[index] = _activation(signal, module)
        before = layer.module
    return signal


def _affine(signal: Signal, module: nn.Module, norm: BatchNorm | None) -> tuple[Signal, Tensor]:
    """Pass y = W x + b and, where given, the batch norm after it; return also what it adds.

    The variance is s^2 W^2 times that of x, plus u^2/3 times the square of each intermediate result
    that is rounded on the one way or the other:

    - the products w x and, because they may be folded, the weights s w;
    - the partial sums, which start at 0 or at the bias, be it s b or, folded, s (b - mean) + beta:
      the largest of the three counts (`_PartialSums`). An input of 0 adds nothing, rounds nothing;
    - the result y, and with batch norm s z, twice, as it may be the sum that ended at the bias;
    - s itself, by var + eps, root, quotient and gamma, the same on both ways: 4 (y - beta)^2;
    - folded, b - mean, s (b - mean) and s (b - mean) + beta; kept, s mean and beta - s mean.

    Average pooling sums neighbours, often equal ones (a background). Equal neighbours carry one
    error, not independent ones, and adding a number again and again rounds off the same remainder
    each time: in both places standard deviations add, not variances.

    For the bound, each of the n products and the bias takes part in n additions and at most one
    rounding more; with batch norm, 8 more, s mean and beta included. Whatever underflows is off by
    `UNDERFLOW` instead, which s, an input or a weight may multiply.
    """
    product, weight, bias, axis = operands(module, signal.value)
    reach = signal.value.abs() + signal.bound  # of the float32 input
    active = (reach > 0).double()
    terms = product(active, torch.ones_like(weight))
    squares = product(signal.value**2, weight**2)
    size = product(reach, weight.abs()) + bias.abs()

    scale, mean, beta = normalization(norm, size)
    start = scale * (bias - mean) + beta

    if isinstance(module, Pooling):
        carried = product(signal.variance.sqrt(), weight) ** 2
        z = product(signal.value, weight)
        partial_sums = (terms * product(signal.value.abs(), weight) / 2) ** 2
    else:
        carried = product(signal.variance, weight**2)
        sums = _PartialSums.of(signal.value, active, weight, product, axis)
        z = sums.last + bias
        partial_sums = reduce(
            torch.maximum,
            (sums.squares(scale, begin) for begin in (torch.zeros(1), scale * bias, start)),
        )
    y = scale * (z - mean) + beta
    rounded = scale**2 * squares + partial_sums + y**2
    roundings = terms + 1
    if norm is not None:
        rounded += scale**2 * squares + 2 * (scale * z) ** 2 + 4 * (y - beta) ** 2
        rounded += 2 * (scale * (bias - mean)) ** 2 + start**2
        rounded += (scale * mean) ** 2 + (beta - scale * mean) ** 2
        roundings = roundings + 8
    gain = scale.abs()
    terms_size = gain * (size + mean.abs()) + beta.abs()
    gamma_k = roundings * ROUNDOFF / (1 - roundings * ROUNDOFF)
    largest = reach.flatten(1).amax(1).reshape(-1, *[1] * (size.dim() - 1))
    tiny = UNDERFLOW * (1 + gain) * roundings * (1 + largest + size + mean.abs())
    high = reduce(torch.maximum, (size, terms_size, gain * weight.abs().max()))
    lost = torch.where(high > OVERFLOW, torch.inf, 0.0)
    fresh = ROUNDOFF**2 / 3 * rounded + tiny**2 + lost
    bound = gain * product(signal.bound, weight.abs()) + gamma_k * terms_size + tiny + lost
    return Signal(y, scale**2 * carried + fresh, bound), fresh


@dataclass(frozen=True)
class _PartialSums:
    """The partial sums of the products w x that make each output, all float64.

    They are taken in the order of the inputs, block by block; the order within a block counts as
    random. With N products t that add up to d, the partial sum of k of them is k d / N on average,
    its square k (N-k) / (N (N-1)) sum t^2 + k (k-1) / (N (N-1)) d^2: summed over k = 1 ... N,
    d (N+1)/2 and (N+1) (sum t^2 / 6 + d^2 / 3). Blocks matter where neighbouring inputs are alike:
    an image's partial sums wander further than those of its pixels shuffled.

    Attributes:
        last: the sum of all products.
        count: how many are not 0.
        first: the sum of the partial sums.
        second: the sum of their squares.
    """

    last: Tensor
    count: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(
        cls, value: Tensor, active: Tensor, weight: Tensor, product: Product, axis: int | None
    ) -> "_PartialSums":
        """Sum along an axis of the inputs, or all as one block."""
        blocks = [(value, active, weight)]
        if axis is not None:
            size = max(1, round(value.shape[axis] ** 0.5))
            blocks = list(
                zip(
                    torch.split(value, size, axis),
                    torch.split(active, size, axis),
                    torch.split(weight, size, 1),
                    strict=True,
                )
            )
        last = count = first = second = torch.zeros((), dtype=torch.float64)
        for x, used, w in blocks:
            step, n = product(x, w), product(used, torch.ones_like(w))
            squares = product(x**2, w**2)
            second = second + n * last**2
            second = second + (n + 1) * (last * step + squares / 6 + step**2 / 3)
            first = first + n * last + (n + 1) * step / 2
            last, count = last + step, count + n
        return cls(last, count, first, second)

    def squares(self, scale: Tensor, start: Tensor) -> Tensor:
        """Return the sum of the squares of ``scale`` times the partial sums plus ``start``."""
        return scale**2 * self.second + 2 * scale * start * self.first + start**2 * self.count


def operands(module: nn.Module, value: Tensor) -> tuple[Product, Tensor, Tensor, int | None]:
    """Return a layer's sum of products, its weights, its bias, and the axis that sums run along.

    All float64. No axis where products are summed over pixels only, or over a group of channels.
    """
    none = torch.zeros(1, dtype=torch.float64)
    match module:
        case nn.Linear():
            bias = none if module.bias is None else module.bias.double()
            return F.linear, module.weight.double(), bias, -1
        case nn.Conv2d():
            convolve = partial(
                F.conv2d,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
            )
            bias = none if module.bias is None else module.bias.double().reshape(-1, 1, 1)
            return convolve, module.weight.double(), bias, 1 if module.groups == 1 else None
        case nn.AvgPool2d():
            window_sum = partial(
                F.avg_pool2d,
                kernel_size=module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                ceil_mode=module.ceil_mode,
                divisor_override=1,
            )
        case nn.AdaptiveAvgPool2d():
            window_sum = partial(torch.sum, dim=(-2, -1), keepdim=True)
        case _:  # a batch norm of its own: 1 times each input
            return torch.mul, torch.ones(1, dtype=torch.float64), none, None
    ones = torch.ones_like(value[:1])
    weights = module(ones) / window_sum(ones)  # padding counts or does not, so read it off
    return (lambda x, w: window_sum(x) * w), weights, none, None


def normalization(norm: BatchNorm | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch norm's s, mean and beta, float64, to fit the outputs of the layer before."""
    scale, mean, beta = torch.ones(1, dtype=torch.float64), torch.zeros(1), torch.zeros(1)
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = _per_channel(norm.running_mean, like)
        scale = 1 / (_per_channel(norm.running_var, like) + norm.eps).sqrt()
        if norm.affine:
            scale, beta = scale * _per_channel(norm.weight, like), _per_channel(norm.bias, like)
    return scale, mean, beta


def _per_channel(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.double().reshape(-1, *[1] * (like.dim() - 2))


def _activation(signal: Signal, module: nn.Module) -> tuple[Signal, Tensor]:
    """Pass a unit of the ReLU family: an error grows by the steepest slope that the input may meet.

    That is the steepest within `ALARM` standard deviations of its value, for the bound within the
    bound. A leaky unit rounds twice below 0: its slope to float32, and the product.
    """
    x = signal.value
    leak, ceiling = kinks(module, x)

    def slope(error: Tensor) -> Tensor:
        above = (x + error > 0) & (x - error < ceiling)
        return torch.maximum(above.double(), (x - error < 0) * leak.abs())

    deviation, bound = ALARM * signal.variance.sqrt(), signal.bound
    rounded = (x < deviation) * 2 * (leak * x) ** 2
    roundings = (x < bound) * 3 * ROUNDOFF * leak.abs() * (x.abs() + bound)
    tiny = UNDERFLOW * (leak != 0) * (1 + x.abs() + bound)
    fresh = ROUNDOFF**2 / 3 * rounded + tiny**2
    variance = slope(deviation) ** 2 * signal.variance + fresh
    return Signal(activate(module, x), variance, slope(bound) * bound + roundings + tiny), fresh


def activate(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a unit of the ReLU family to float64."""
    leak, ceiling = kinks(module, x)
    return torch.where(x > 0, x.clamp(max=ceiling), leak * x)


def kinks(module: nn.Module, like: Tensor) -> tuple[Tensor, float]:
    """Return the slope of a unit of the ReLU family below 0, and the input where it is cut off."""
    leak = torch.zeros(1, dtype=torch.float64)
    if isinstance(module, nn.LeakyReLU):
        leak = torch.tensor([module.negative_slope], dtype=torch.float64)
    elif isinstance(module, nn.PReLU):
        leak = _per_channel(module.weight, like)
    return leak, 6.0 if isinstance(module, nn.ReLU6) else torch.inf
