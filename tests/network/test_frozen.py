from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.network.frozen import (
    batch_norm_layers,
    require_frozen,
    statistics,
    statistics_untouched,
)
from mnist_batchnorm.network.model import Architecture


def network(momentum: float = 0.1, eps: float = 1e-5) -> nn.Sequential:
    return Architecture((6, 5, 4, 3), True, momentum, eps).build(seed=0)


def batch(seed: int, n: int = 16) -> Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trained() -> nn.Sequential:
    """A network whose statistics have moved, in eval mode."""
    model = network().train()
    for seed in range(3):
        model(batch(seed))
    return model.eval()


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def double(tensor: Tensor | None) -> npt.NDArray[np.float64]:
    assert tensor is not None
    return tensor.detach().numpy().astype(np.float64)


def test_layers_and_statistics_are_found_by_name() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.BatchNorm2d(2))
    model.add_module("body", network())
    assert list(batch_norm_layers(model)) == ["stem", "body.bn1", "body.bn2"]
    assert list(statistics(model)) == [
        f"{layer}.{buffer}"
        for layer in ("stem", "body.bn1", "body.bn2")
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    ]


def test_statistics_are_a_copy() -> None:
    model = network().train()
    before = statistics(model)
    model(batch(0))
    assert all(not torch.equal(before[name], now) for name, now in statistics(model).items())


@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 16])
def test_training_updates_statistics_by_the_formula(momentum: float, n: int) -> None:
    """Ioffe & Szegedy 2015, algorithm 2: the population variance is estimated without bias.

    The moving average and the sense of its momentum are those of torch.nn.BatchNorm1d.
    """
    model = network(momentum).train()
    mean, variance = np.zeros(5), np.ones(5)
    for seed in range(4):
        with torch.no_grad():
            incoming = double(model[0](batch(seed, n)))
        model(batch(seed, n))
        mean = (1 - momentum) * mean + momentum * incoming.mean(axis=0)
        variance = (1 - momentum) * variance + momentum * incoming.var(axis=0, ddof=1)
    layer = batch_norm_layers(model)["bn1"]
    np.testing.assert_allclose(double(layer.running_mean), mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(double(layer.running_var), variance, rtol=1e-5)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_training_normalizes_by_the_batch_and_inference_by_the_statistics(eps: float) -> None:
    model = network(eps=eps).train()
    layer = batch_norm_layers(model)["bn1"]
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 6.0))
        layer.bias.copy_(torch.arange(5.0))
        incoming = model[0](batch(0))
        from_batch = double(layer(incoming))
        layer.eval()
        from_statistics = double(layer(incoming))
    x = double(incoming)
    for result, mean, variance in (
        (from_batch, x.mean(axis=0), x.var(axis=0)),  # biased: algorithm 1 of the paper
        (from_statistics, double(layer.running_mean), double(layer.running_var)),
    ):
        expected = (x - mean) / np.sqrt(variance + eps) * np.arange(1, 6) + np.arange(5)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 100])
def test_inference_leaves_statistics_untouched_bit_for_bit(trained: nn.Sequential, n: int) -> None:
    before = bits(statistics(trained))
    with statistics_untouched(trained):
        trained(1000 * batch(9, n))
    assert bits(statistics(trained)) == before


def test_forward_pass_in_train_mode_is_caught(trained: nn.Sequential) -> None:
    def evaluate_in_train_mode() -> None:
        with statistics_untouched(trained):
            trained.train()(batch(9))

    with pytest.raises(CheckFailedError) as caught:
        evaluate_in_train_mode()
    for name in statistics(trained):
        assert name in str(caught.value)


def test_one_layer_in_train_mode_is_caught_by_name(trained: nn.Sequential) -> None:
    trained.get_submodule("bn2").train()

    def evaluate() -> None:
        with statistics_untouched(trained):
            trained(batch(9))

    with pytest.raises(CheckFailedError, match=r"bn2\.running_mean") as caught:
        evaluate()
    assert "bn1" not in str(caught.value)


def test_statistics_that_were_no_numbers_before_are_untouched(trained: nn.Sequential) -> None:
    layer = batch_norm_layers(trained)["bn1"]
    assert layer.running_mean is not None
    layer.running_mean.fill_(float("nan"))
    with statistics_untouched(trained):
        trained(batch(9))


def test_a_zero_that_changes_its_sign_is_caught(trained: nn.Sequential) -> None:
    layer = batch_norm_layers(trained)["bn1"]
    assert layer.running_mean is not None
    layer.running_mean.zero_()

    def negate() -> None:
        with statistics_untouched(trained):
            layer.running_mean.neg_()  # type: ignore[union-attr]

    with pytest.raises(CheckFailedError, match=r"bn1\.running_mean"):
        negate()


def test_error_inside_is_not_hidden(trained: nn.Sequential) -> None:
    def fail() -> None:
        with statistics_untouched(trained):
            trained.train()(batch(9))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_trained_network_in_eval_mode_is_frozen(trained: nn.Sequential) -> None:
    require_frozen(trained)


def test_network_without_batch_norm_needs_only_eval_mode() -> None:
    plain = Architecture((6, 5, 3), batch_norm=False).build()
    with pytest.raises(CheckFailedError, match="train mode"):
        require_frozen(plain)
    require_frozen(plain.eval())


def keep_no_statistics(model: nn.Sequential) -> None:
    model.bn2 = nn.BatchNorm1d(4, track_running_stats=False).eval()


def set_statistic(name: str, value: float) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        layer, buffer = name.split(".")
        model.get_submodule(layer).get_buffer(buffer)[-1] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model: model.train(),
            r"in train mode: Sequential, linear1, bn1, .*model\.eval\(\)",
        ),
        (lambda model: model.bn2.train(), r"in train mode: bn2;"),
        (lambda model: model.relu1.train(), r"in train mode: relu1;"),
        (keep_no_statistics, r"bn2 keeps no running statistics \(track_running_stats=False\)"),
        (lambda model: model.bn2.reset_running_stats(), r"bn2 has never updated"),
        (set_statistic("bn1.running_mean", float("nan")), r"bn1 holds statistics that are not"),
        (set_statistic("bn1.running_mean", float("inf")), r"bn1 holds statistics that are not"),
        (set_statistic("bn2.running_var", float("nan")), r"bn2 holds statistics that are not"),
        (set_statistic("bn2.running_var", float("inf")), r"bn2 holds statistics that are not"),
        (set_statistic("bn2.running_var", -1e-9), r"bn2 holds statistics .* negative"),
    ],
    ids=[
        "train mode",
        "one batch norm in train mode",
        "another layer in train mode",
        "no statistics",
        "never updated",
        "NaN mean",
        "infinite mean",
        "NaN variance",
        "infinite variance",
        "negative variance",
    ],
)
def test_network_that_is_not_frozen_is_refused_by_name(
    trained: nn.Sequential, spoil: Callable[[nn.Sequential], object], message: str
) -> None:
    spoil(trained)
    with pytest.raises(CheckFailedError, match=message):
        require_frozen(trained)


def test_variance_of_zero_is_possible(trained: nn.Sequential) -> None:
    set_statistic("bn1.running_var", 0.0)(trained)  # a unit that is the same for every image
    require_frozen(trained)
