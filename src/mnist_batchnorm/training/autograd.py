"""Trainers for any network: autograd and `torch.optim.Adam`, the reference of `fused`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.fused import CHUNK_STEPS
from mnist_batchnorm.training.trainer import Progress, ignore_progress


class AutogradTrainer:
    """Trains one network of any kind."""

    def __init__(self, model: nn.Module, data: DeviceSplit, lr: float) -> None:
        self._model, self._data = model, data
        self._optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, parameter in model.named_parameters():
            # as Adam does in its first step; made here so that a checkpoint can fill it
            state = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            self._optimizer.state[parameter] = state
            self.tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}

    def run(self, order: Tensor, progress: Progress = ignore_progress) -> Tensor:
        """Take one step per batch; see `Trainer.run`."""
        (batches,) = order.to(self._data.labels.device)
        self._model.train()
        losses = []
        for number, batch in enumerate(batches, start=1):
            loss = F.cross_entropy(self._model(self._data.inputs[batch]), self._data.labels[batch])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            losses.append(loss.detach())
            if number % CHUNK_STEPS == 0 or number == len(batches):
                progress((number - 1) % CHUNK_STEPS + 1)
        return torch.stack(losses)[None]


class SequentialTrainer:
    """Trains replicas of a network of any kind, one after another."""

    def __init__(self, models: Sequence[nn.Module], data: DeviceSplit, lr: float) -> None:
        self._trainers = [AutogradTrainer(model, data, lr) for model in models]
        self.tensors = {
            f"{replica}.{name}": tensor
            for replica, trainer in enumerate(self._trainers)
            for name, tensor in trainer.tensors.items()
        }

    def run(self, order: Tensor, progress: Progress = ignore_progress) -> Tensor:
        """Take one step per batch; see `Trainer.run`."""
        *others, last = zip(self._trainers, order[:, None], strict=True)
        losses = [trainer.run(batches) for trainer, batches in others]
        trainer, batches = last
        return torch.cat([*losses, trainer.run(batches, progress)])
