"""How far float32 rounding may carry a network's outputs from exact arithmetic.

Two answers for every element of a layer's output, relative to float64 arithmetic:

- `UncertainTensor.variance`: the expected error. A rounding to nearest has a relative error within
  the unit roundoff u = 2^-24, modeled as uniform, so of variance u^2/3, and independent of others
  (Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis"). Variances of
  independent errors add, so they pass a layer by W^2. Errors that enter a layer are correlated if
  they stem from one earlier rounding; so the variance of the outputs is at least the sum over all
  roundings of the squared derivative by each (`_variance_by_derivatives`). An error beyond
  `ALARM_SIGMAS` standard deviations is not rounding.
- `UncertainTensor.bound`: the worst case. k roundings change a number by a factor within
  1 +- gamma_k, gamma_k = k u / (1 - k u) (Higham 2002, "Accuracy and Stability of Numerical
  Algorithms", lemma 3.1), in any order of summation, with or without fused multiply-add. It needs
  no assumption and is about 1000 times larger.

Batch norm in eval mode is y = s (z - mean) + beta, s = gamma / sqrt(var + eps) (Ioffe & Szegedy
2015, algorithm 2). A correct file keeps it, and runtimes compute s z + (beta - s mean); or folds it
into the layer before, with weights s W and bias s (b - mean) + beta. Both answers cover both files:
`_linear` treats the two layers as one and counts the roundings of either form.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's convention
from torch import Tensor, nn

from mnist_batchnorm.parity.layers import BatchNorm, Layer, LinearOrConv

ROUNDOFF = 2.0**-24  # u: half the spacing of the float32 numbers just above 1
UNDERFLOW = 2.0**-150  # half the spacing of the float32 numbers around 0
OVERFLOW = torch.finfo(torch.float32).max
ALARM_SIGMAS = 8  # standard deviations
MAX_OUTPUTS = 256  # for `_variance_by_derivatives`: one backward pass per output
CHUNK_ELEMENTS = 2**18  # of the inputs: 2 MB, so that a chunk's tensors stay in the cache

Product = Callable[[Tensor, Tensor], Tensor]  # sums of products of inputs and weights
Pooling = nn.AvgPool2d | nn.AdaptiveAvgPool2d


@dataclass(frozen=True)
class UncertainTensor:
    """Activations of a batch with their rounding errors; float64 tensors of one shape.

    Attributes:
        value: exact value.
        variance: variance of the accumulated rounding error.
        bound: bound on the absolute rounding error. Both are infinite or NaN where a float32 may
            have overflowed.
    """

    value: Tensor
    variance: Tensor
    bound: Tensor


Observe = Callable[[Layer, UncertainTensor], None]


@torch.inference_mode()
def propagate_errors(
    layers: Sequence[Layer], inputs: Tensor, observe: Observe = lambda layer, entering: None
) -> UncertainTensor:
    """Compute a network's outputs in eval mode with their rounding errors.

    Args:
        layers: supported float32 layers.
        inputs: float32 ``[n, ...]``, n > 0, finite.
        observe: called with each activation layer and its input, once per chunk of inputs.
    """
    rows = max(1, CHUNK_ELEMENTS // inputs[0].numel())
    with torch.inference_mode(False):  # inference tensors have no derivatives
        exact = [deepcopy(layer.module).double().requires_grad_(False).eval() for layer in layers]
    chunks = []
    for chunk in torch.split(inputs.double(), rows):
        fresh: dict[int, Tensor] = {}
        signal = _propagate_chunk(layers, chunk, observe, fresh)
        if fresh and signal.value.flatten(1).shape[1] <= MAX_OUTPUTS:
            variance = _variance_by_derivatives(exact, chunk, fresh)
            signal = replace(signal, variance=torch.fmax(signal.variance, variance))
        chunks.append(signal)
    return UncertainTensor(
        torch.cat([chunk.value for chunk in chunks]),
        torch.cat([chunk.variance for chunk in chunks]),
        torch.cat([chunk.bound for chunk in chunks]),
    )


def _variance_by_derivatives(
    exact: Sequence[nn.Module], inputs: Tensor, fresh: Mapping[int, Tensor]
) -> Tensor:
    """Return the variance of the outputs, float64 ``[n, ...]``, over all paths of each rounding.

    ``fresh`` maps a layer's index to the variance of the roundings made in it.
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
            gradients = torch.autograd.grad(outputs[:, output].sum(), added, retain_graph=True)
            for gradient, rounded in zip(gradients, fresh.values(), strict=True):
                variance[:, output] += (gradient**2 * rounded.clone()).flatten(1).sum(1)
    return variance.detach().view_as(value)


def _propagate_chunk(
    layers: Sequence[Layer], inputs: Tensor, observe: Observe, fresh: dict[int, Tensor]
) -> UncertainTensor:
    signal = UncertainTensor(inputs, torch.zeros_like(inputs), torch.zeros_like(inputs))
    before: nn.Module | None = None
    after = [layer.module for layer in layers[1:]] + [None]
    for index, (layer, following) in enumerate(zip(layers, after, strict=True)):
        match layer.module:
            case nn.Linear() | nn.Conv2d() as module:
                norm = following if isinstance(following, BatchNorm) else None
                signal, fresh[index + (norm is not None)] = _linear(signal, module, norm)
            case nn.BatchNorm1d() | nn.BatchNorm2d() as module:
                if not isinstance(before, LinearOrConv):  # else already done
                    signal, fresh[index] = _linear(signal, module, module)
            case nn.AvgPool2d() | nn.AdaptiveAvgPool2d() as module:
                signal, fresh[index] = _linear(signal, module, None)
            case nn.Flatten() | nn.MaxPool2d() as module:
                # a maximum's error is at most the largest error in its window
                signal = UncertainTensor(
                    *map(module, (signal.value, signal.variance, signal.bound))
                )
            case module:
                observe(layer, signal)
                signal, fresh[index] = _activation(signal, module)
        before = layer.module
    return signal


def _linear(
    signal: UncertainTensor, module: nn.Module, norm: BatchNorm | None
) -> tuple[UncertainTensor, Tensor]:
    """Apply y = W x + b and the batch norm after it, if any; also return the added variance.

    The variance is s^2 W^2 times that of x, plus u^2/3 times the square of every intermediate
    result that is rounded in either form, kept or folded:

    - products w x and, because they may be folded, weights s w;
    - partial sums, which start at 0 or at the bias, be it s b or, folded, s (b - mean) + beta: the
      largest of the three counts (`PartialSums`). An input of 0 adds nothing and rounds nothing;
    - the result y, and with batch norm s z, twice, as it may be the sum that ended at the bias;
    - s, by var + eps, root, quotient and gamma: 4 (y - beta)^2;
    - folded, b - mean, s (b - mean) and s (b - mean) + beta; kept, s mean and beta - s mean.

    Average pooling sums neighbors, often equal ones (a background). Equal neighbors carry one
    error, not independent ones, and repeated addition of one number rounds off the same remainder
    each time: in both places standard deviations add, not variances.

    For the bound, each of the n products and the bias takes part in n additions and at most one
    more rounding; with batch norm in 8 more, including s mean and beta. An underflow is off by
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
        sums = PartialSums.of(signal.value, active, weight, product, axis)
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
    return UncertainTensor(y, scale**2 * carried + fresh, bound), fresh


@dataclass(frozen=True)
class PartialSums:
    """Moments of the partial sums of the products w x that make each output, all float64.

    Sums run in the order of the inputs, block by block; the order within a block counts as random.
    With N products t that add up to d, the partial sum of k of them is k d / N on average, its
    square k (N-k) / (N (N-1)) sum t^2 + k (k-1) / (N (N-1)) d^2: summed over k = 1 ... N,
    d (N+1)/2 and (N+1) (sum t^2 / 6 + d^2 / 3). Blocks matter if neighboring inputs are alike: the
    partial sums of an image wander further than those of its shuffled pixels.

    Attributes:
        last: sum of all products.
        count: number of nonzero products.
        first: sum of the partial sums.
        second: sum of their squares.
    """

    last: Tensor
    count: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(
        cls, value: Tensor, active: Tensor, weight: Tensor, product: Product, axis: int | None
    ) -> "PartialSums":
        """Sum along an axis of the inputs in blocks, or everything as one block."""
        blocks = [(value, active, weight)]
        if axis is not None:
            size = max(1, round(value.shape[axis] ** 0.5))
            parts = ((value, axis), (active, axis), (weight, 1))
            blocks = list(zip(*(torch.split(x, size, along) for x, along in parts), strict=True))
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
    """Return a layer's sum of products, its weights and bias, float64, and the axis of the sums.

    The axis is None if products are summed over pixels only, or over a group of channels.
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
        case _:  # a batch norm without a layer to fold into: 1 times each input
            return torch.mul, torch.ones(1, dtype=torch.float64), none, None
    ones = torch.ones_like(value[:1])
    weights = module(ones) / window_sum(ones)  # padding may count or not, so measure it
    return (lambda x, w: window_sum(x) * w), weights, none, None


def normalization(norm: BatchNorm | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch norm's s, mean and beta, float64, broadcastable to ``like``."""
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


def _activation(signal: UncertainTensor, module: nn.Module) -> tuple[UncertainTensor, Tensor]:
    """Apply a unit of the ReLU family: an error grows by the steepest slope near the input.

    "Near" is within `ALARM_SIGMAS` standard deviations for the variance, within the bound for the
    bound. A leaky unit rounds twice below 0: its slope to float32, and the product.
    """
    x = signal.value
    leak, ceiling = kinks(module, x)

    def slope(error: Tensor) -> Tensor:
        above = (x + error > 0) & (x - error < ceiling)
        return torch.maximum(above.double(), (x - error < 0) * leak.abs())

    deviation, bound = ALARM_SIGMAS * signal.variance.sqrt(), signal.bound
    rounded = (x < deviation) * 2 * (leak * x) ** 2
    roundings = (x < bound) * 3 * ROUNDOFF * leak.abs() * (x.abs() + bound)
    tiny = UNDERFLOW * (leak != 0) * (1 + x.abs() + bound)
    fresh = ROUNDOFF**2 / 3 * rounded + tiny**2
    variance = slope(deviation) ** 2 * signal.variance + fresh
    return UncertainTensor(
        activate(module, x), variance, slope(bound) * bound + roundings + tiny
    ), fresh


def activate(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a unit of the ReLU family to a float64 tensor."""
    leak, ceiling = kinks(module, x)
    return torch.where(x > 0, x.clamp(max=ceiling), leak * x)


def kinks(module: nn.Module, like: Tensor) -> tuple[Tensor, float]:
    """Return the slope of a unit of the ReLU family below 0, and the input that caps its output."""
    leak = torch.zeros(1, dtype=torch.float64)
    if isinstance(module, nn.LeakyReLU):
        leak += module.negative_slope
    elif isinstance(module, nn.PReLU):
        leak = _per_channel(module.weight, like)
    return leak, 6.0 if isinstance(module, nn.ReLU6) else torch.inf
