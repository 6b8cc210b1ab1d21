"""Frozen statistics: checks that batch norm will compute in production what it learned."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mnist_batchnorm.core.errors import CheckFailedError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def batch_norm_layers(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the model's batch-norm layers by their qualified name, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchNorm)}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copy every batch-norm buffer (``bn1.running_mean`` …), on the device where it lives."""
    return {
        f"{name}.{key}": buffer.detach().clone()
        for name, layer in batch_norm_layers(model).items()
        for key, buffer in layer.named_buffers()
    }


@contextlib.contextmanager
def statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Raise a CheckFailedError if the block changes a bit of a batch-norm buffer."""
    before = statistics(model)
    yield
    after = statistics(model)
    changed = [name for name in before if not _same_bits(before[name], after[name])]
    if changed:
        raise CheckFailedError(
            f"evaluation changed the running statistics {', '.join(changed)}: "
            "a layer was in train mode"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # torch.equal reports an unchanged NaN as a change, and misses 0.0 becoming -0.0
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def require_frozen(model: nn.Module) -> None:
    """Check a model before export.

    Raises:
        CheckFailedError: A module is in train mode; a batch-norm layer keeps no running
            statistics, has never updated them, or holds impossible ones; a weight is not finite.
    """
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise CheckFailedError(f"in train mode: {', '.join(training)}; call model.eval() first")
    for name, layer in batch_norm_layers(model).items():
        mean, variance, updates = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or variance is None or updates is None:
            raise CheckFailedError(
                f"{name} keeps no running statistics (track_running_stats=False): "
                "it would normalize by whatever batch it is served"
            )
        if updates.item() == 0:
            raise CheckFailedError(f"{name} has never updated its running statistics: train first")
        if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
            raise CheckFailedError(f"{name} holds statistics that are not finite or are negative")
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise CheckFailedError(f"not finite: {', '.join(broken)}; train again")
