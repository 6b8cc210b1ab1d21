import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.params import Params, TrainParams
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.network.frozen import batch_norm_layers
from mnist_batchnorm.training import loop
from mnist_batchnorm.training.autograd import AutogradTrainer
from mnist_batchnorm.training.devices import DeviceSplit, describe_device, resolve_device
from mnist_batchnorm.training.fused import FusedTrainer
from mnist_batchnorm.training.loop import architecture, fit, make_trainer, measure, shuffled_batches
from mnist_batchnorm.training.trainer import Progress

CPU = torch.device("cpu")

Change = Callable[..., TrainParams]


@pytest.fixture
def change(params: Params) -> Change:
    """Return the committed training parameters with one epoch, or as told."""

    def change(**values: object) -> TrainParams:
        return params.train.model_copy(update={"epochs": 1, **values})

    return change


@pytest.fixture(scope="session")
def train(prepared: Path) -> DeviceSplit:
    return DeviceSplit.load(prepared / "train.safetensors", CPU)


@pytest.fixture(scope="session")
def valid(prepared: Path) -> DeviceSplit:
    return DeviceSplit.load(prepared / "valid.safetensors", CPU)


def head(split: DeviceSplit, n: int) -> DeviceSplit:
    return DeviceSplit(split.inputs[:n], split.labels[:n])


def built(variant: str, params: TrainParams) -> nn.Sequential:
    return architecture(variant, params).build(params.seed)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# --- data and batches ---------------------------------------------------------------------------


def test_device_split_holds_the_prepared_images(prepared: Path, valid: DeviceSplit) -> None:
    split = load_split(prepared / "valid.safetensors")
    np.testing.assert_array_equal(valid.inputs, network_input(split.images), strict=True)
    np.testing.assert_array_equal(valid.labels, split.labels)
    assert valid.labels.dtype == torch.int64


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (96, 32), (33, 32), (5, 5), (7, 2)])
def test_epoch_shows_every_image_at_most_once_in_whole_batches(n: int, batch_size: int) -> None:
    epoch = shuffled_batches(n, batch_size, torch.Generator().manual_seed(0))
    assert epoch.shape == (n // batch_size, batch_size)
    shown = epoch.flatten().tolist()
    assert len(set(shown)) == n - n % batch_size
    assert set(shown) <= set(range(n))


def test_the_last_images_of_the_permutation_are_left_over_as_with_drop_last() -> None:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    batches = shuffled_batches(11, 4, torch.Generator().manual_seed(5))
    assert batches.tolist() == [order[:4].tolist(), order[4:8].tolist()]


def test_images_left_over_differ_from_epoch_to_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = [set(shuffled_batches(33, 32, generator).flatten().tolist()) for _ in range(4)]
    assert len({frozenset(images) for images in shown}) > 1


def test_order_is_shuffled_anew_each_epoch_and_decided_by_the_seed() -> None:
    def two_epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [shuffled_batches(96, 32, generator).flatten().tolist() for _ in range(2)]

    first, second = two_epochs(0)
    assert sorted(first) == sorted(second) == list(range(96))
    assert first not in (second, list(range(96)))
    assert two_epochs(0) == [first, second]
    assert two_epochs(1)[0] != first


def expected_batches(n: int, params: TrainParams) -> list[Tensor]:
    generator = torch.Generator().manual_seed(params.seed)
    epochs = [shuffled_batches(n, params.batch_size, generator) for _ in range(params.epochs)]
    return [batch for epoch in epochs for batch in epoch]


def test_both_networks_see_the_same_batches_in_the_same_order(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    small, params = head(train, 70), change(epochs=2)

    def seen(variant: str) -> list[Tensor]:
        inputs: list[Tensor] = []

        def record(model: nn.Module, args: tuple[Tensor]) -> None:
            if model.training:
                inputs.append(args[0].clone())

        model = built(variant, params)
        model.register_forward_pre_hook(record)
        fit(model, small, valid, params)
        return inputs

    expected = [small.inputs[batch] for batch in expected_batches(70, params)]
    assert len(expected) == 4
    for variant in VARIANTS:
        for ours, theirs in zip(seen(variant), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_fast_step_is_given_the_same_batches_too(
    train: DeviceSplit, valid: DeviceSplit, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, params = head(train, 70), change(epochs=2)
    run = FusedTrainer.run

    def seen(variant: str) -> list[Tensor]:
        given: list[Tensor] = []

        def record(trainer: FusedTrainer, order: Tensor, progress: Progress) -> Tensor:
            assert order.shape == (1, 2, params.batch_size)
            given.extend(order[0].clone())
            return run(trainer, order, progress)

        monkeypatch.setattr(FusedTrainer, "run", record)
        fit(built(variant, params), small, valid, params)
        return given

    for variant in VARIANTS:
        for ours, theirs in zip(seen(variant), expected_batches(70, params), strict=True):
            assert torch.equal(ours, theirs)


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_fit_is_what_plain_pytorch_does(
    variant: str, train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    # In float64: batch norm cancels the bias before it, whose gradient is rounding noise, and
    # Adam makes whole steps of noise as large as float32's.
    small, watched = (
        DeviceSplit(split.inputs[:160].double(), split.labels[:160]) for split in (train, valid)
    )
    params = change(epochs=2)
    model, reference = (built(variant, params).double() for _ in range(2))
    fit(model, small, watched, params)

    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01, fused=False, foreach=False)
    generator = torch.Generator().manual_seed(params.seed)
    for _ in range(2):
        order = torch.randperm(160, generator=generator).tolist()
        for start in range(0, 160, 32):
            batch = order[start : start + 32]
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(reference(small.inputs[batch]), small.labels[batch])
            loss.backward()
            optimizer.step()
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fit_learns(variant: str, train: DeviceSplit, valid: DeviceSplit, change: Change) -> None:
    params = change(epochs=3)
    curve = fit(built(variant, params), train, valid, params)
    assert curve[-1].valid_accuracy > 0.8  # 0.88 to 0.93 over six seeds; chance is 0.1
    assert curve[-1].train_loss < curve[0].train_loss < math.log(10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_trains_the_same_bits(
    variant: str, train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    def run(seed: int) -> tuple[list[Epoch], dict[str, bytes]]:
        params = change(seed=seed)
        model = built(variant, params)
        return fit(model, head(train, 640), valid, params), bits(model)

    assert run(0) == run(0)
    curve, weights = run(0)
    other_curve, other_weights = run(1)
    assert curve != other_curve
    assert all(weights[name] != other_weights[name] for name in weights if "num_b" not in name)


def test_network_handed_over_in_eval_mode_is_trained_all_the_same(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(epochs=2)
    models = built("bn", params).train(), built("bn", params).eval()
    for model in models:
        fit(model, head(train, 320), valid, params)
    assert bits(models[0]) == bits(models[1])


def test_curve_is_measured_after_each_epoch(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(epochs=2)
    model, told = built("bn", params), list[Epoch]()
    measured = []

    def on_epoch(epoch: Epoch) -> None:
        told.append(epoch)
        measured.append((*measure(model, train), *measure(model, valid)))

    curve = fit(model, train, valid, params, on_epoch)
    assert told == curve
    assert [epoch.epoch for epoch in curve] == [1, 2]
    assert [tuple(asdict(epoch).values())[1:] for epoch in curve] == measured
    assert not any(module.training for module in model.modules())


def test_watching_does_not_change_training(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(epochs=2)
    models = [built("bn", params) for _ in range(2)]
    for model, watched in zip(models, (valid, head(valid, 1)), strict=True):
        fit(model, head(train, 320), watched, params)
    assert bits(models[0]) == bits(models[1])


def hooked(model: nn.Sequential) -> nn.Sequential:
    """Make autograd train it: the fast step would pass the hook by."""
    model.register_forward_hook(lambda *_: None)
    return model


def test_hook_chooses_autograd_and_both_networks_the_fast_step(
    train: DeviceSplit, change: Change
) -> None:
    for variant in VARIANTS:
        model = built(variant, change())
        assert type(make_trainer([model], train, 32, 0.01)) is FusedTrainer
        assert type(make_trainer([hooked(model)], train, 32, 0.01)) is AutogradTrainer


def test_autograd_trains_what_the_fast_step_does_not_know(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(epochs=2)
    model = nn.Sequential(nn.Linear(784, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 10))
    assert type(make_trainer([model], train, 32, 0.01)) is AutogradTrainer
    assert fit(model, train, valid, params)[-1].valid_accuracy > 0.7


@pytest.mark.parametrize("by_autograd", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_that_is_no_number_fails_with_its_step(
    variant: str, by_autograd: bool, train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(lr=1e38)
    model = built(variant, params)
    told: list[Epoch] = []
    place = r"no longer finite in epoch 1, step 2 of 10 \(lr 1e\+38\): lower train\.lr in params"
    with pytest.raises(CheckFailedError, match=place):
        fit(hooked(model) if by_autograd else model, head(train, 320), valid, params, told.append)
    assert told == []


def test_first_step_whose_loss_is_no_number_is_named() -> None:
    losses = torch.zeros(2, 1400)
    loop.require_finite(losses, 1, 0.1)
    losses[1, 1233] = float("inf")
    losses[0, 1300] = float("nan")
    with pytest.raises(CheckFailedError, match=r"in epoch 3, step 1,234 of 1,400 \(lr 0\.1\)"):
        loop.require_finite(losses, 3, 0.1)


def test_epoch_that_measures_no_number_fails(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    """The last step's update is in no batch's loss."""
    unlit = DeviceSplit(valid.inputs * torch.inf, valid.labels)
    told: list[Epoch] = []
    with pytest.raises(CheckFailedError, match=r"no longer finite after epoch 1 \(lr 0\.01\)"):
        fit(built("plain", change()), head(train, 320), unlit, change(), told.append)
    assert told == []


@pytest.mark.parametrize("by_autograd", [False, True])
def test_progress_counts_every_step_and_changes_nothing(
    by_autograd: bool, train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(epochs=2, batch_size=8)
    watched, alone = (built("bn", params) for _ in range(2))
    if by_autograd:
        watched, alone = hooked(watched), hooked(alone)
    taken: list[int] = []
    curve = fit(watched, train, valid, params, lambda _: None, taken.append)
    assert taken == [100, 100, 25] * 2  # 1,800 images
    assert fit(alone, train, valid, params) == curve
    assert bits(watched) == bits(alone)


def test_batch_larger_than_the_data_is_the_users_mistake(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(batch_size=65)
    with pytest.raises(UserError, match=r"train\.batch_size: 65 is more than the 64 training"):
        fit(built("bn", params), head(train, 64), valid, params)


def test_batch_as_large_as_the_data_is_one_step(
    train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    params = change(batch_size=64, epochs=3)
    model = built("bn", params)
    fit(model, head(train, 64), valid, params)
    assert [layer.num_batches_tracked for layer in batch_norm_layers(model).values()] == [3, 3]


# --- measuring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_statistics_and_mode_alone(
    training: bool, valid: DeviceSplit, change: Change
) -> None:
    model = built("bn", change()).train()
    model(valid.inputs)  # so that the statistics are not those of a new network
    model.train(training)
    before = bits(model)
    measure(model, valid)
    assert bits(model) == before
    assert all(module.training is training for module in model.modules())


def test_measuring_uses_the_running_statistics(valid: DeviceSplit, change: Change) -> None:
    model = built("bn", change()).train()
    model(valid.inputs)
    with torch.no_grad():
        logits = model.eval()(valid.inputs[:1])
    loss, _ = measure(model.train(), head(valid, 1))  # one image has no statistics of its own
    assert loss == F.cross_entropy(logits, valid.labels[:1]).item()


class StuckInTraining(nn.BatchNorm1d):
    """A layer that ignores `eval()`."""

    def train(self, mode: bool = True) -> "StuckInTraining":
        return super().train(True)


def test_layer_that_ignores_eval_is_caught(valid: DeviceSplit) -> None:
    model = nn.Sequential(nn.Linear(784, 10), StuckInTraining(10))
    with pytest.raises(CheckFailedError, match=r"1\.running_mean, 1\.running_var"):
        measure(model, valid)


def test_measures_are_means_over_all_images(
    valid: DeviceSplit, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("plain", change())
    with torch.no_grad():
        probability = model(valid.inputs).double().softmax(dim=1)
    of_label = probability[torch.arange(200), valid.labels]
    monkeypatch.setattr(loop, "EVALUATION_BATCH_SIZE", 64)  # 200 = 3 * 64 + 8
    loss, accuracy = measure(model, valid)
    assert loss == pytest.approx(-of_label.log().mean().item(), rel=1e-6)
    assert accuracy == (of_label == probability.max(dim=1).values).sum().item() / 200


def test_measuring_leaves_each_module_in_its_mode(valid: DeviceSplit, change: Change) -> None:
    model = built("bn", change()).train()
    model.get_submodule("bn1").eval()  # frozen on purpose while the rest trains
    measure(model, valid)
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]


# --- devices ------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("name", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_device_is_the_one_named(
    name: str, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_device_that_is_not_there_is_the_users_mistake(
    name: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus)
    with pytest.raises(UserError, match=rf"train\.device: {name}: .* sees {gpus} CUDA GPUs"):
        resolve_device(name)


@pytest.mark.usefixtures("deterministic")
def test_determinism_is_asked_for() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_trains_the_same_network(
    variant: str, train: DeviceSplit, valid: DeviceSplit, change: Change
) -> None:
    gpu = resolve_device("auto")
    assert gpu.type == "cuda"
    assert torch.cuda.get_device_name(gpu) in describe_device(gpu)
    params = change(epochs=2)

    def run(device: torch.device) -> tuple[list[Epoch], nn.Sequential]:
        model = built(variant, params).to(device)
        learnt, watched = (
            DeviceSplit(s.inputs.to(device), s.labels.to(device)) for s in (train, valid)
        )
        return fit(model, learnt, watched, params), model.cpu()

    curve, model = run(gpu)
    again, same = run(gpu)
    assert curve == again
    assert bits(model) == bits(same)
    # The batches are the CPU's. Other rounding drifts apart over 112 steps, though little: float64
    # on the CPU, with the same batches, ends within 0.3 % of this loss.
    on_cpu, _ = run(CPU)
    assert curve[-1].valid_loss == pytest.approx(on_cpu[-1].valid_loss, rel=0.05)
    assert curve[-1].valid_accuracy == pytest.approx(on_cpu[-1].valid_accuracy, abs=0.03)


# --- the network ---------------------------------------------------------------------------------


def test_architecture_follows_the_parameters(change: Change) -> None:
    params = change(hidden=(8, 7), bn_momentum=0.3, bn_eps=0.01)
    bn, plain = architecture("bn", params), architecture("plain", params)
    assert bn.widths == plain.widths == (784, 8, 7, 10)
    assert (bn.bn_momentum, bn.bn_eps) == (0.3, 0.01)
    assert (bn.batch_norm, plain.batch_norm) == (True, False)
