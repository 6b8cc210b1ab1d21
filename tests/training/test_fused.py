"""The fused step equals the step of `nn.Module`, autograd and `torch.optim.Adam`.

Float32 trajectories drift apart by rounding alone: Adam turns the sign of a gradient that is
rounding noise into a whole step. So the comparison is of one step from each of 300 states of a real
training, of whole trajectories in float64, and of accuracies over seeds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.network.model import Architecture
from mnist_batchnorm.training import fused as module
from mnist_batchnorm.training.autograd import AutogradTrainer
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.fused import FusedTrainer, fusible_blocks
from mnist_batchnorm.training.loop import make_trainer, measure, shuffled_batches

CPU = torch.device("cpu")
BATCH, LR, STEPS = 32, 0.01, 300
ROUNDOFF = 2.0**-24  # of float32
# Largest error of the fused step, relative to that of autograd's float32, both against float64:
# both round every sum once per term, in different orders. Measured: at most 3.4.
FACTOR = 8.0


@pytest.fixture(scope="module")
def data(prepared: Path) -> DeviceSplit:
    return DeviceSplit.load(prepared / "train.safetensors", CPU)


@pytest.fixture(scope="module")
def valid(prepared: Path) -> DeviceSplit:
    return DeviceSplit.load(prepared / "valid.safetensors", CPU)


def double(split: DeviceSplit) -> DeviceSplit:
    return DeviceSplit(split.inputs.double(), split.labels)


def network(variant: str, seed: int = 0) -> nn.Sequential:
    return Architecture((784, 32, 32, 10), variant == "bn").build(seed)


def order(data: DeviceSplit, steps: int, seed: int = 0) -> Tensor:
    """Batches as training sees them, epoch after epoch, ``[steps, BATCH]``."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // (len(data.labels) - BATCH)) + 1
    return torch.cat([shuffled_batches(len(data.labels), BATCH, generator) for _ in range(epochs)])[
        :steps
    ]


def fused(models: list[nn.Sequential], data: DeviceSplit) -> FusedTrainer:
    return FusedTrainer(models, data.inputs, data.labels, BATCH, LR)


# --- one step from the same state ---------------------------------------------------------------


def states(variant: str, data: DeviceSplit) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The states of a training by autograd, each with the batch that comes next."""
    trainer = AutogradTrainer(network(variant), data, LR)
    for batch in order(data, STEPS):
        yield {name: tensor.detach().clone() for name, tensor in trainer.tensors.items()}, batch
        trainer.run(batch[None, None])


class Reference:
    """Autograd's step from any state."""

    def __init__(self, variant: str, data: DeviceSplit) -> None:
        self.model = network(variant).to(data.inputs.dtype)
        self.trainer = AutogradTrainer(self.model, data, LR)

    def step(self, state: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        """Loss, gradients and the state after one step."""
        fill(self.trainer.tensors, state)
        loss = self.trainer.run(batch[None, None]).squeeze()
        gradients = {
            f"{name}.gradient": parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        after = {name: tensor.detach() for name, tensor in self.trainer.tensors.items()}
        return {"loss": loss, **gradients, **after}


def fill(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_is_autograds_to_rounding_at_300_states(variant: str, data: DeviceSplit) -> None:
    trainer = fused([network(variant)], data)
    float32, float64 = Reference(variant, data), Reference(variant, double(data))
    worst: dict[str, float] = {}
    for state, batch in states(variant, data):
        stacked = {name: tensor[None] for name, tensor in state.items()}
        fill(trainer.tensors, stacked | {"step": state["linear1.weight.step"]})
        ours = {
            "loss": trainer.run(batch[None, None]).squeeze(),
            **{f"{name}.gradient": tensor[0] for name, tensor in trainer.gradients.items()},
            **{name: tensor[0] for name, tensor in trainer.tensors.items() if name != "step"},
        }
        steps = trainer.tensors["step"].item()
        theirs = float32.step(state, batch)
        exact = float64.step(as_double(state), batch)
        for name, tensor in ours.items():
            if name in trainer.parameters:
                # Adam magnifies what little the gradients differ by: it is held to its own moments
                expected, step = adam_step(state[name], ours, name, steps)
                allowed = FACTOR * ROUNDOFF * (expected.abs() + step.abs())
                assert ((tensor - expected).abs() <= allowed).all(), name
            elif tensor.is_floating_point():
                # the loss is a difference of numbers of the logits' size, 1 and more
                scale = max(exact[name].abs().max().item(), float(name == "loss"))
                unit = max(distance(theirs[name], exact[name]), ROUNDOFF * scale)
                worst[name] = max(worst.get(name, 0.0), distance(tensor, exact[name]) / unit)
            else:
                assert torch.equal(tensor, theirs[name]), name
    assert max(worst.values()) <= FACTOR, worst


def as_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in state.items()}


def adam_step(
    before: Tensor, after: dict[str, Tensor], name: str, steps: float
) -> tuple[Tensor, Tensor]:
    """Adam's parameter and its step (Kingma & Ba 2015, algorithm 1) from the new moments."""
    first, second = after[f"{name}.exp_avg"].double(), after[f"{name}.exp_avg_sq"].double()
    step = LR * (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
    return before.double() - step, step


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# --- trajectories -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_trajectory_in_float64_is_autograds(variant: str, data: DeviceSplit) -> None:
    ours, theirs = (network(variant).double() for _ in range(2))
    batches = order(data, STEPS)[None]
    losses = fused([ours], double(data)).run(batches)
    expected = AutogradTrainer(theirs, double(data), LR).run(batches)
    assert distance(losses, expected) < 1e-8
    for name, tensor in ours.state_dict().items():
        assert distance(tensor, theirs.state_dict()[name]) < 1e-8, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_in_float64_are_single_runs(variant: str, data: DeviceSplit) -> None:
    seeds = (0, 3, 7)
    together = [network(variant, seed).double() for seed in seeds]
    batches = torch.stack([order(data, STEPS, seed) for seed in seeds])
    losses = fused(together, double(data)).run(batches)
    for seed, replica, of_replica, batch in zip(seeds, together, losses, batches, strict=True):
        alone = network(variant, seed).double()
        assert distance(fused([alone], double(data)).run(batch[None])[0], of_replica) < 1e-8
        for name, tensor in replica.state_dict().items():
            assert distance(tensor, alone.state_dict()[name]) < 1e-8, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_replica_takes_the_step_of_a_single_run_to_rounding(
    variant: str, data: DeviceSplit
) -> None:
    # from three states of three trainings, 100 times
    seeds = (0, 3, 7)
    singles = [fused([network(variant, seed)], data) for seed in seeds]
    together = fused([network(variant, seed) for seed in seeds], data)
    batches = torch.stack([order(data, STEPS // 3, seed) for seed in seeds])
    worst = 0.0
    for step in batches.unbind(1):
        for name, tensor in together.tensors.items():
            parts = [single.tensors[name] for single in singles]
            tensor.copy_(parts[0] if name == "step" else torch.cat(parts))
        before = {name: part.clone() for name, part in together.parameters.items()}
        together.run(step[:, None])
        for replica, (single, batch) in enumerate(zip(singles, step, strict=True)):
            single.run(batch[None, None])
            for name in single.parameters:
                here, there = together.gradients[name][replica], single.gradients[name][0]
                scale = max(there.abs().max().item(), 1e-30)
                worst = max(worst, distance(here, there) / scale / ROUNDOFF)
                after = {k: t[replica] for k, t in together.tensors.items() if k != "step"}
                steps = together.tensors["step"].item()
                expected, change = adam_step(before[name][replica], after, name, steps)
                allowed = FACTOR * ROUNDOFF * (expected.abs() + change.abs())
                assert ((after[name] - expected).abs() <= allowed).all(), name
            for name, buffer in single.buffers.items():
                difference = distance(together.buffers[name][replica], buffer[0])
                assert difference <= FACTOR * ROUNDOFF * buffer.abs().max().item(), name
    assert worst <= 4 * FACTOR * BATCH**0.5, worst


def test_accuracy_over_ten_seeds_does_not_differ(data: DeviceSplit, valid: DeviceSplit) -> None:
    for variant in VARIANTS:
        gains = []
        for seed in range(10):
            ours, theirs = network(variant, seed), network(variant, seed)
            batches = order(data, STEPS // 3, seed)[None]
            fused([ours], data).run(batches)
            AutogradTrainer(theirs, data, LR).run(batches)
            gains.append(measure(ours, valid)[1] - measure(theirs, valid)[1])
        error = np.std(gains, ddof=1) / len(gains) ** 0.5
        # Student's t, 9 degrees of freedom, 99 %
        assert abs(np.mean(gains)) <= 3.250 * error + 1e-12, (variant, gains)
        assert error < 0.01  # so that a loss of 3 points would show


# --- a sequence of steps ------------------------------------------------------------------------


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_steps_do_not_depend_on_how_they_are_cut(
    variant: str, chunk: int, data: DeviceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = network(variant), network(variant)
    batches = order(data, 45)[None]
    expected = fused([whole], data).run(batches)
    monkeypatch.setattr(module, "CHUNK_STEPS", chunk)
    trainer, taken = fused([cut], data), list[int]()
    losses = torch.cat([trainer.run(part, taken.append) for part in torch.split(batches, 22, 1)], 1)
    assert torch.equal(losses, expected)
    assert bits(cut) == bits(whole)
    assert sum(taken) == 45
    assert max(taken) <= chunk


def test_gpu_replays_the_captured_steps(data: DeviceSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the path for a GPU but CUDA's own part in it."""
    recorded = []

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        assert device == CPU
        recorded.append(work)
        return work

    monkeypatch.setattr(module, "capture_graph", record)
    monkeypatch.setattr(module, "CHUNK_STEPS", 10)
    monkeypatch.setattr(module, "is_capturable", lambda tensor: True)
    eager, replayed = network("bn"), network("bn")
    trainer = fused([replayed], data)
    for part in torch.split(order(data, 90)[None], 45, 1):  # 4 chunks of 10 and one of 5, twice
        trainer.run(part)
    assert len(recorded) == 2  # one a length
    monkeypatch.undo()
    fused([eager], data).run(order(data, 90)[None])
    assert bits(replayed) == bits(eager)


def test_every_step_works_on_the_same_tensors(data: DeviceSplit) -> None:
    # a graph goes by addresses
    trainer = fused([network("bn")], data)
    before = {name: tensor.data_ptr() for name, tensor in trainer.tensors.items()}
    trainer.run(order(data, 130)[None])
    assert {name: tensor.data_ptr() for name, tensor in trainer.tensors.items()} == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_are_the_trained_ones_after_each_run(variant: str, data: DeviceSplit) -> None:
    models = [network(variant, seed) for seed in (0, 1)]
    trainer = fused(models, data)
    for part in torch.split(order(data, 20).expand(2, -1, -1), 10, 1):
        trainer.run(part)
        for name, stacked in (trainer.parameters | trainer.buffers).items():
            for model, expected in zip(models, stacked, strict=True):
                assert torch.equal(model.state_dict()[name], expected), name
    if variant == "bn":
        assert [int(m.get_buffer("bn2.num_batches_tracked")) for m in models] == [20, 20]


def test_bias_before_batch_norm_stays_what_it_was(data: DeviceSplit) -> None:
    model = network("bn")
    before = model.get_parameter("linear1.bias").detach().clone()
    fused([model], data).run(order(data, 50)[None])
    assert torch.equal(model.get_parameter("linear1.bias"), before)


def test_loss_that_is_not_finite_is_at_its_step(data: DeviceSplit) -> None:
    spoilt = DeviceSplit(data.inputs.clone(), data.labels)
    batches = order(data, 30)[None]
    spoilt.inputs[batches[0, 16, 3]] = float("nan")
    first = int((batches[0] == batches[0, 16, 3]).any(1).nonzero()[0])
    losses = fused([network("plain")], spoilt).run(batches)[0]
    assert losses[:first].isfinite().all()
    assert not losses[first:].isfinite().any()


# --- supported networks ---------------------------------------------------------------------------


def with_hook(model: nn.Module) -> nn.Module:
    model.get_submodule("0").register_forward_hook(lambda *_: None)
    return model


def frozen(model: nn.Module) -> nn.Module:
    model.get_parameter("0.weight").requires_grad = False
    return model


def with_parameter_hook(model: nn.Module) -> nn.Module:
    model.get_parameter("0.weight").register_hook(lambda g: g)  # type: ignore[no-untyped-call]
    return model


def one_relu_twice() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 2), relu)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


class OwnLinear(nn.Linear):
    """Who knows what it computes."""


UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "no Sequential": lambda: nn.ModuleList([nn.Linear(8, 2)]),
    "empty": nn.Sequential,
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Linear(8, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)),
    "no ReLU": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)),
    "ReLU at the end": lambda: nn.Sequential(nn.Linear(8, 2), nn.ReLU()),
    "batch norm at the end": lambda: nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2)),
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    "batch norm after ReLU": lambda: nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)
    ),
    "GELU": lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)),
    "no bias": lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)),
    "not affine": lambda: normed(affine=False),
    "no statistics": lambda: normed(track_running_stats=False),
    "cumulative statistics": lambda: normed(momentum=None),
    "own type": lambda: nn.Sequential(OwnLinear(8, 2)),
    "a hook": lambda: with_hook(nn.Sequential(nn.Linear(8, 2))),
    "a hook on a parameter": lambda: with_parameter_hook(nn.Sequential(nn.Linear(8, 2))),
    "one ReLU twice": one_relu_twice,
    "frozen": lambda: frozen(nn.Sequential(nn.Linear(8, 2))),
    "tied": tied,
    "float16": lambda: nn.Sequential(nn.Linear(8, 2)).half(),
}


def normed(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_network_that_is_not_supported(name: str) -> None:
    model = UNSUPPORTED[name]()
    assert fusible_blocks(model) is None
    with pytest.raises(ValueError, match="does not support"):
        FusedTrainer([model], torch.zeros(64, 8), torch.zeros(64, dtype=torch.int64), 32, LR)


def test_unsupported_network_is_trained_by_the_plain_loop_with_a_message(
    data: DeviceSplit, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(784, 16), nn.GELU(), nn.Linear(16, 10))
    assert isinstance(make_trainer([model], data, BATCH, LR), AutogradTrainer)
    assert "plain loop" in capsys.readouterr().err
    assert isinstance(make_trainer([network("bn")], data, BATCH, LR), FusedTrainer)
    assert capsys.readouterr().err == ""


def test_replicas_must_be_alike(data: DeviceSplit) -> None:
    with pytest.raises(ValueError, match="not alike"):
        fused([network("bn"), network("plain")], data)
    with pytest.raises(ValueError, match="not alike"):
        fused([network("bn"), Architecture((784, 32, 32, 10), True, bn_eps=1e-3).build(0)], data)


@pytest.mark.parametrize("widths", [(784, 10), (784, 7, 10), (784, 5, 9, 3, 10)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_any_depth_and_width(widths: tuple[int, ...], batch_norm: bool, data: DeviceSplit) -> None:
    build = Architecture(widths, batch_norm, bn_momentum=0.3, bn_eps=0.01).build
    ours, theirs = build(1).double(), build(1).double()
    batches = order(data, 30)[None]
    fused([ours], double(data)).run(batches)
    AutogradTrainer(theirs, double(data), LR).run(batches)
    for name, tensor in ours.state_dict().items():
        assert distance(tensor, theirs.state_dict()[name]) < 1e-9, name


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_gpu_takes_the_steps_of_the_cpu(variant: str, replicas: int, data: DeviceSplit) -> None:
    exact = double(data)
    on_gpu = DeviceSplit(exact.inputs.cuda(), exact.labels.cuda())
    batches = torch.stack([order(data, STEPS, seed) for seed in range(replicas)])
    here = [network(variant, seed).double() for seed in range(replicas)]
    there = [network(variant, seed).double().cuda() for seed in range(replicas)]
    losses = fused(here, exact).run(batches)
    assert distance(fused(there, on_gpu).run(batches).cpu(), losses) < 1e-8
    for ours, theirs in zip(here, there, strict=True):
        for name, tensor in ours.state_dict().items():
            assert distance(tensor, theirs.state_dict()[name].cpu()) < 1e-8, name


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_and_single_steps_give_the_same_bits(
    variant: str, data: DeviceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = DeviceSplit(data.inputs.cuda(), data.labels.cuda())
    captured, eager = network(variant).cuda(), network(variant).cuda()
    fused([captured], on_gpu).run(order(data, STEPS)[None])
    monkeypatch.setattr(module, "is_capturable", lambda tensor: False)
    fused([eager], on_gpu).run(order(data, STEPS)[None])
    assert bits(captured.cpu()) == bits(eager.cpu())
