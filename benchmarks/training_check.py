"""What `benchmarks.training --check` does: the contenders from the same start, in float64."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.training_contenders import plain_epoch
from mnist_batchnorm.core.params import TrainParams
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.loop import architecture, fit, shuffled_batches

STEPS = 20
# Of any weight's or statistic's difference. Most agree to 1e-13, but the gradient of a bias before
# batch norm is 0 save for rounding, and Adam makes a step of lr * 1e-17 / 1e-8 from that.
LIMIT = 1e-9


@dataclass(frozen=True)
class Trial:
    """Made-up images and a network, in float64, for `STEPS` steps in two epochs.

    Attributes:
        variant: the network.
        params: of its training.
        split: a few images more than whole batches, a third of the pixels always 0.
    """

    variant: str
    params: TrainParams
    split: DeviceSplit

    @classmethod
    def make(cls, variant: str, params: TrainParams) -> "Trial":
        """Make one from a fixed seed."""
        params = params.model_copy(update={"epochs": 2})
        network = architecture(variant, params)
        generator = torch.Generator().manual_seed(0)
        n = STEPS // 2 * params.batch_size + 1
        inputs = torch.rand(n, network.widths[0], generator=generator, dtype=torch.float64)
        inputs[:, ::3] = 0
        labels = torch.randint(network.widths[-1], (n,), generator=generator)
        return cls(variant, params, DeviceSplit(inputs, labels))

    def network(self) -> nn.Sequential:
        """Make the network with its initial weights."""
        return architecture(self.variant, self.params).build(self.params.seed).double()

    def orders(self) -> list[Tensor]:
        """Return the order of the images in each epoch, indices ``[steps, batch]``."""
        generator = torch.Generator().manual_seed(self.params.seed)
        arguments = len(self.split.labels), self.params.batch_size, generator
        return [shuffled_batches(*arguments) for _ in range(self.params.epochs)]

    def plain(self) -> dict[str, Tensor]:
        """Return the weights and statistics that the plain loop arrives at."""
        model = self.network()
        optimizer = torch.optim.Adam(model.parameters(), lr=self.params.lr, fused=True)
        for order in self.orders():
            plain_epoch(model, optimizer, self.split, order)
        return model.state_dict()

    def engine(self) -> dict[str, Tensor]:
        """Return those of this project's engine."""
        model = self.network()
        fit(model, self.split, self.split, self.params)
        return model.state_dict()

    def jax(self) -> dict[str, Tensor]:
        """Return those of JAX."""
        from benchmarks.jax_training import final_state

        start = {name: tensor.numpy() for name, tensor in self.network().state_dict().items()}
        data = self.split.inputs.numpy(), self.split.labels.numpy()
        final = final_state(self.params, start, *data, [order.numpy() for order in self.orders()])
        return {name: torch.tensor(array) for name, array in final.items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of any weight, bias or running statistic."""
    names = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    return max(float((found[name] - expected[name]).abs().max()) for name in names)


def check(params: TrainParams) -> int:
    """Print how far the contenders are from the plain loop; return the exit status."""
    print(f"Largest difference from the plain loop after {STEPS} steps in float64\n")
    print("| network | this project | JAX |\n|---|---|---|")
    worst = 0.0
    for variant in VARIANTS:
        trial = Trial.make(variant, params)
        expected = trial.plain()
        found = [difference(trial.engine(), expected)]
        if importlib.util.find_spec("jax"):
            found.append(difference(trial.jax(), expected))
        cells = [f"{value:.1e}" for value in found] + ["not installed"] * (2 - len(found))
        print(f"| {variant} | {' | '.join(cells)} |")
        worst = max(worst, *found)
    return int(not worst <= LIMIT)
