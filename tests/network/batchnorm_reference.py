"""Batch normalization, Algorithm 1 of the paper, written out for readers; no stage runs it.

test_batchnorm_reference.py compares it with `nn.BatchNorm1d`.

S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv:1502.03167. A mini-batch ``x`` is ``[N, C]``: N examples (the
paper's m) of C units, each normalized on its own; ``mean``, ``variance``, ``gamma`` and ``beta``
are ``[C]``. All are float32, or all float64; every sum runs over the N examples.

Training, Algorithm 1, `normalize` and `scale_and_shift`::

    mean     = 1/N sum(x)                                      line 1: mini-batch mean
    variance = 1/N sum((x - mean)^2)                           line 2: mini-batch variance
    x_hat    = (x - mean) / sqrt(variance + eps)               line 3: normalize
    y        = gamma x_hat + beta                              line 4: scale and shift

Its gradients, `backward`, by the chain rule of section 3, in the order of the paper, which numbers
no formula there; ``d_v`` is the gradient of the loss by v::

    d_x_hat    = d_y gamma
    d_variance = sum(d_x_hat (x - mean)) (-1/2) (variance + eps)^(-3/2)
    d_mean     = sum(d_x_hat) (-1) / sqrt(variance + eps) + d_variance (-2/N) sum(x - mean)
    d_x        = d_x_hat / sqrt(variance + eps) + d_variance 2/N (x - mean) + d_mean 1/N
    d_gamma    = sum(d_y x_hat)
    d_beta     = sum(d_y)

What fast code computes is the same put together::

    d_x        = (d_x_hat - 1/N sum(d_x_hat) - x_hat 1/N sum(d_x_hat x_hat)) / sqrt(variance + eps)

Inference, Algorithm 2, `update_running` and `infer`::

    E[x]   = average over mini-batches of mean                 line 10
    Var[x] = average over mini-batches of N/(N-1) variance     line 10
    y      = gamma (x - E[x]) / sqrt(Var[x] + eps) + beta      line 11, not multiplied out

So two variances: a mini-batch is normalized by its own, which is biased; inference estimates the
population's without bias. PyTorch does the same. Where the paper averages over mini-batches of the
trained network, PyTorch keeps an exponential moving average while it trains, and ``momentum`` is
the weight of the newest mini-batch, not of the past.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Normalized(NamedTuple):
    """A mini-batch after lines 1 to 3 of Algorithm 1: all that `backward` needs of it.

    Attributes:
        x_hat: ``[N, C]``, mean 0 and variance ``variance / (variance + eps)``.
        centered: ``[N, C]``, x - mean.
        mean: ``[C]``.
        variance: ``[C]``, biased: 1/N.
        inverse_std: ``[C]``, 1 / sqrt(variance + eps).
    """

    x_hat: Tensor
    centered: Tensor
    mean: Tensor
    variance: Tensor
    inverse_std: Tensor


class Gradients(NamedTuple):
    """Gradients of the loss by the inputs of Algorithm 1.

    Attributes:
        x: ``[N, C]``.
        gamma: ``[C]``.
        beta: ``[C]``.
    """

    x: Tensor
    gamma: Tensor
    beta: Tensor


class Running(NamedTuple):
    """What training leaves for inference.

    Attributes:
        mean: ``[C]``, E[x] of Algorithm 2.
        variance: ``[C]``, Var[x] of Algorithm 2, unbiased: 1/(N-1).
    """

    mean: Tensor
    variance: Tensor


def normalize(x: Tensor, eps: float) -> Normalized:
    """Normalize a mini-batch by its own statistics: Algorithm 1, lines 1 to 3.

    Args:
        x: ``[N, C]``, N at least 2.
        eps: added to the variance, so that a unit that is the same for every example gives zeros.

    Raises:
        ValueError: x is not ``[N, C]``, or its batch has no variance because N is less than 2.
    """
    _require_rows_of_units(x)
    if len(x) < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}:"
            " one example has no variance to be normalized by; leave such a last batch out"
            " (drop_last), or call eval() to normalize by the running statistics"
        )
    mean = x.mean(0)
    centered = x - mean
    variance = centered.square().mean(0)
    inverse_std = 1 / (variance + eps).sqrt()
    return Normalized(centered * inverse_std, centered, mean, variance, inverse_std)


def scale_and_shift(x_hat: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Give each unit the scale and the mean that the network has learned: Algorithm 1, line 4."""
    return gamma * x_hat + beta


def backward(d_y: Tensor, batch: Normalized, gamma: Tensor) -> Gradients:
    """Carry the gradient back through Algorithm 1: the chain rule of section 3.

    The mean and the variance depend on every example, so every example's gradient does.

    Args:
        d_y: ``[N, C]``, gradient of the loss by what `scale_and_shift` returned.
        batch: what `normalize` returned.
        gamma: ``[C]``.
    """
    n = len(d_y)
    d_x_hat = d_y * gamma
    d_variance = (d_x_hat * batch.centered).sum(0) * -0.5 * batch.inverse_std**3
    # through the variance nothing reaches the mean: sum(x - mean) is 0
    d_mean = -d_x_hat.sum(0) * batch.inverse_std
    return Gradients(
        x=d_x_hat * batch.inverse_std + d_variance * 2 / n * batch.centered + d_mean / n,
        gamma=(d_y * batch.x_hat).sum(0),
        beta=d_y.sum(0),
    )


def update_running(running: Running, batch: Normalized, momentum: float) -> Running:
    """Move the running statistics towards a mini-batch's: Algorithm 2, line 10, as PyTorch does.

    Args:
        running: before; it stays as it is.
        batch: what `normalize` returned.
        momentum: weight of this mini-batch, 0 to 1. With 1/k for the k-th mini-batch the result is
            the average of all, as in the paper.
    """
    n = len(batch.x_hat)
    unbiased = batch.variance * n / (n - 1)
    return Running(
        mean=(1 - momentum) * running.mean + momentum * batch.mean,
        variance=(1 - momentum) * running.variance + momentum * unbiased,
    )


def infer(x: Tensor, gamma: Tensor, beta: Tensor, running: Running, eps: float) -> Tensor:
    """Normalize by the running statistics: Algorithm 2, line 11.

    Each row's result depends on that row only, so N may be 1.

    Raises:
        ValueError: x is not ``[N, C]``.
    """
    _require_rows_of_units(x)
    x_hat = (x - running.mean) / (running.variance + eps).sqrt()
    return scale_and_shift(x_hat, gamma, beta)


def _require_rows_of_units(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"expected a mini-batch [N, C], got input size {list(x.shape)}")


class Transform(torch.autograd.Function):
    """Algorithm 1 for autograd, which then uses the gradients written out here.

    ``Transform.apply(x, gamma, beta, eps)`` returns y, which is differentiable once, and the fields
    of `Normalized`, which are not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Normalize, scale and shift."""
        batch = normalize(x, eps)
        ctx.save_for_backward(gamma, *batch)
        ctx.mark_non_differentiable(*batch)
        return scale_and_shift(batch.x_hat, gamma, beta), *batch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients by x, gamma and beta; eps has none."""
        gamma, *batch = ctx.saved_tensors
        return *backward(d_y, Normalized(*batch), gamma), None


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm1d` for ``[N, C]``, with its names in the ``state_dict``.

    Attributes:
        weight: gamma, ``[C]``, initially 1.
        bias: beta, ``[C]``, initially 0.
        running_mean: ``[C]``, initially 0.
        running_var: ``[C]``, unbiased, initially 1.
        num_batches_tracked: mini-batches that the running statistics have seen, int64.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        """Make the layer as PyTorch does.

        Args:
            features: C.
            eps: added to the variance.
            momentum: weight of the newest mini-batch in the running statistics; None averages over
                all mini-batches alike, as the paper does.
        """
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.register_buffer("running_mean", torch.empty(features))
        self.register_buffer("running_var", torch.empty(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all that was learned, the running statistics included, as PyTorch's does."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Forget every mini-batch: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[N, C]``: by the batch in train mode, by the running statistics in eval mode.

        Raises:
            ValueError: x is not ``[N, C]``, or in train mode N is less than 2.
        """
        running = Running(self.running_mean, self.running_var)
        if not self.training:
            return infer(x, self.weight, self.bias, running, self.eps)
        y: Tensor
        y, *batch = Transform.apply(x, self.weight, self.bias, self.eps)
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()
        updated = update_running(running, Normalized(*batch), momentum)
        self.running_mean.copy_(updated.mean)
        self.running_var.copy_(updated.variance)
        return y
