"""The error model against float32 arithmetic done in every way that is honest."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mnist_batchnorm.parity.error_model import (
    ALARM_SIGMAS,
    PartialSums,
    UncertainTensor,
    propagate_errors,
)
from tests.support.parity_networks import Shape, cnn, folded, layers_of, mlp, randomized

Float32 = npt.NDArray[np.float32]
Order = Callable[[npt.NDArray[np.intp]], npt.NDArray[np.intp]]


def image_like(rows: int, size: int) -> Float32:
    """Strokes on an empty background: neighbours are alike, most elements are 0."""
    generator = np.random.default_rng(0)
    images = np.zeros((rows, size), np.float32)
    for image in images:
        for start in generator.integers(0, size, 4):
            image[start : start + size // 16] = generator.random()
    return images


def smooth(model: nn.Sequential, size: int) -> nn.Sequential:
    """Give neighbouring inputs similar weights, as training on images does."""
    wave = torch.sin(torch.arange(size) * (2 * torch.pi * 3 / size))
    with torch.no_grad():
        linear(model).weight.add_(wave / size**0.5)
    return model


def linear(model: nn.Sequential) -> nn.Linear:
    first = model[0]
    assert isinstance(first, nn.Linear)
    return first


def one_by_one(model: nn.Sequential, inputs: Float32, order: Order) -> Float32:
    """Compute an MLP in float32 without fused multiply-add: each product and each sum rounds."""
    x = inputs
    for module in model:
        if isinstance(module, nn.Linear):
            weight, bias = (p.detach().numpy() for p in (module.weight, module.bias))
            sums = np.broadcast_to(bias, (len(x), len(bias))).copy()
            for k in order(np.arange(weight.shape[1])):
                sums += x[:, k : k + 1] * weight[:, k]
            x = sums
        elif isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            scale = (module.weight / torch.sqrt(module.running_var + module.eps)).detach().numpy()
            x = x * scale + (module.bias.detach().numpy() - module.running_mean.numpy() * scale)
        else:
            x = np.maximum(x, 0)
    return x


def errors(signal: UncertainTensor, got: Float32 | Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.abs(np.asarray(got, np.float64) - signal.value.numpy())
    return found


def sigmas(signal: UncertainTensor, got: Float32 | Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = errors(signal, got) / signal.variance.sqrt().numpy()
    return found


NETWORKS: dict[str, tuple[Callable[[int], nn.Sequential], Shape]] = {
    "mlp": (mlp, (12,)),
    "mlp, large weights": (lambda seed: mlp(seed, gain=4.0), (12,)),
    "cnn": (cnn, (2, 8, 8)),
    "batch norm first": (
        lambda seed: randomized(nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 4)), seed),
        (9,),
    ),
    "two of one kind": (
        lambda seed: randomized(
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.LeakyReLU()),
            seed,
        ),
        (6,),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
class TestValue:
    def test_is_the_networks_own_in_float64(self, name: str) -> None:
        make, shape = NETWORKS[name]
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(9, *shape))).float()
        signal = propagate_errors(layers_of(make(0), shape), inputs)
        with torch.inference_mode():
            exact = make(0).double()(inputs.double())
        torch.testing.assert_close(signal.value, exact, rtol=1e-12, atol=1e-12)

    def test_of_an_input_does_not_depend_on_the_others(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make, shape = NETWORKS[name]
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(9, *shape))).float()
        together = propagate_errors(layers_of(make(0), shape), inputs)
        monkeypatch.setattr("mnist_batchnorm.parity.error_model.CHUNK_ELEMENTS", 1)
        alone = propagate_errors(layers_of(make(0), shape), inputs)
        for key in ("value", "variance", "bound"):
            torch.testing.assert_close(
                getattr(alone, key), getattr(together, key), rtol=1e-9, atol=0
            )


class TestBound:
    @given(
        name=st.sampled_from(sorted(NETWORKS)),
        seed=st.integers(0, 2**16),
        gain=st.integers(-40, 30),
        size=st.integers(-45, 30),
        share=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def test_is_never_exceeded(
        self, name: str, seed: int, gain: int, size: int, share: float
    ) -> None:
        make, shape = NETWORKS[name]
        model = make(seed)
        generator = np.random.default_rng(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 ** (gain * generator.random() * share))
        inputs = generator.normal(size=(8, *shape)) * 10.0**size
        inputs[generator.random(inputs.shape) < 0.3] = 0
        tensor = torch.from_numpy(inputs.astype(np.float32))
        signal = propagate_errors(layers_of(model, shape), tensor)
        ways = [model, folded(model)]
        with torch.inference_mode(), np.errstate(all="ignore"):
            answers = [way(tensor).numpy() for way in ways]
            if name.startswith("mlp"):
                answers += [one_by_one(way, tensor.numpy(), np.flip) for way in ways]
        judged = (signal.bound.isfinite() & signal.variance.isfinite()).numpy()
        for answer in answers:
            excess = errors(signal, answer)[judged] - signal.bound.numpy()[judged]
            assert (excess <= 0).all()

    def test_is_not_given_where_float32_may_overflow(self) -> None:
        model = randomized(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        with torch.no_grad():
            linear(model).weight.fill_(1e30)
        inputs = torch.tensor([[1e10] * 4, [1.0] * 4])
        signal = propagate_errors(layers_of(model, (4,)), inputs)
        assert signal.bound.isfinite().all(dim=1).tolist() == [False, True]
        assert signal.variance.isfinite().all(dim=1).tolist() == [False, True]

    def test_covers_what_underflows(self) -> None:
        model = nn.Sequential(nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            linear(model).weight.fill_(1e-23)
        inputs = torch.full((1, 2), 1e-23)
        signal = propagate_errors(layers_of(model.eval(), (2,)), inputs)
        with torch.inference_mode():
            got = model(inputs)
        assert errors(signal, got).max() > 1e-5 * signal.value.max()  # most digits are lost
        assert errors(signal, got).max() <= signal.bound.max()
        assert sigmas(signal, got).max() < ALARM_SIGMAS


ORDERS: dict[str, Order] = {
    "natural": lambda k: k,
    "reversed": np.flip,
    "random": lambda k: np.random.default_rng(0).permutation(k),
    "interleaved": lambda k: np.concatenate([k[i::8] for i in range(8)]),
}


class TestVariance:
    """Of thousands of outputs none lies beyond the alarm, and most use a good part of a sigma."""

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("gain", [1.0, 4.0])
    def test_of_sums_in_any_order(self, order: str, gain: float) -> None:
        worst, squares = 0.0, []
        inputs = image_like(100, 400)
        for seed in range(5):
            model = smooth(mlp(seed, (400, 16, 16, 10), gain), 400)
            signal = propagate_errors(layers_of(model, (400,)), torch.from_numpy(inputs))
            for way in (model, folded(model)):
                found = sigmas(signal, one_by_one(way, inputs, ORDERS[order]))
                worst = max(worst, float(found.max()))
                squares.append(float((found**2).mean()))
        assert worst < 6
        assert 0.3 < np.sqrt(np.mean(squares)) < 1.2

    @pytest.mark.parametrize("name", NETWORKS)
    def test_of_pytorchs_own_arithmetic(self, name: str) -> None:
        make, shape = NETWORKS[name]
        worst, squares = 0.0, []
        for seed in range(20):
            inputs = torch.from_numpy(np.random.default_rng(seed).normal(size=(20, *shape))).float()
            model = make(seed)
            signal = propagate_errors(layers_of(model, shape), inputs)
            with torch.inference_mode():
                answers = [model(inputs), folded(model)(inputs)]
            for answer in answers:
                found = sigmas(signal, answer)
                worst = max(worst, float(found.max()))
                squares.append(float((found**2).mean()))
        assert worst < 6
        assert 0.1 < np.sqrt(np.mean(squares)) < 1.2

    def test_of_many_equal_neighbors(self) -> None:
        """Adding one number again and again rounds off the same remainder each time."""
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        inputs = np.linspace(0.1, 0.9, 200, dtype=np.float32).reshape(-1, 1, 1, 1)
        inputs = np.broadcast_to(inputs, (200, 1, 28, 28)).copy()
        signal = propagate_errors(layers_of(model, (1, 28, 28)), torch.from_numpy(inputs))
        sums = np.cumsum(inputs.reshape(200, -1), axis=1, dtype=np.float32)[:, -1:]
        found = sigmas(signal, sums / np.float32(784))
        assert found.max() < 6
        assert np.sqrt((found**2).mean()) > 0.3

    def test_equals_the_sharpest_tolerance_that_holds(self) -> None:
        """A weight off by 1e-4 shows; the classical bound, 1000 times wider, would hide it."""
        model = smooth(mlp(0, (400, 16, 16, 10)), 400)
        inputs = torch.from_numpy(image_like(100, 400))
        signal = propagate_errors(layers_of(model, (400,)), inputs)
        with torch.no_grad():
            linear(model).weight[3] *= 1 + 1e-4
            got = model(inputs)
        assert sigmas(signal, got).max() > 2 * ALARM_SIGMAS
        assert (errors(signal, got) < signal.bound.numpy()).all()

    @given(value=st.floats(-20, 20, width=32), name=st.sampled_from(["ReLU", "ReLU6", "LeakyReLU"]))
    def test_passes_a_unit_where_it_may_be_on(self, value: float, name: str) -> None:
        unit = {"ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "LeakyReLU": nn.LeakyReLU(0.5)}[name]
        model = nn.Sequential(nn.Linear(1, 1), unit).eval()
        with torch.no_grad():
            linear(model).weight.fill_(1.5)
            linear(model).bias.fill_(0.1)
        entering: list[UncertainTensor] = []
        inputs = torch.tensor([[value]])
        layers = layers_of(model, (1,))
        signal = propagate_errors(layers, inputs, lambda layer, signal: entering.append(signal))
        (before,) = entering
        reach = ALARM_SIGMAS * before.variance.sqrt()
        on = bool(before.value > -reach) and not (name == "ReLU6" and before.value > 6 + reach)
        if on:
            assert signal.variance >= before.variance
        elif name == "LeakyReLU":
            assert before.variance / 4 < signal.variance
        else:
            assert signal.variance == 0


class TestPartialSums:
    @pytest.mark.parametrize("start", [0.0, 0.7, -3.0])
    def test_of_one_block_are_the_mean_over_all_orders(self, start: float) -> None:
        products = np.array([0.5, -1.25, 2.0, 0.75, -0.1])
        walks = np.cumsum(np.array(list(permutations(products))), axis=1)
        one = torch.ones(1, 5, dtype=torch.float64)
        value = torch.from_numpy(products)[None]
        sums = PartialSums.of(value, one, one, torch.nn.functional.linear, None)
        assert sums.last.item() == pytest.approx(products.sum())
        assert sums.first.item() == pytest.approx(walks.sum(axis=1).mean())
        assert sums.second.item() == pytest.approx((walks**2).sum(axis=1).mean())
        scaled = ((2 * walks + start) ** 2).sum(axis=1).mean()
        two, begin = torch.tensor(2.0), torch.tensor(start)
        assert sums.squares(two, begin).item() == pytest.approx(scaled)

    def test_of_blocks_of_one_are_those_of_the_natural_order(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        products = np.array([1.0, 2.0, 0.0])  # blocks of round(sqrt(3)) = 2: 1, 2 and then 0
        value = torch.from_numpy(products)[None]
        used = (value != 0).double()
        weight = torch.ones(1, 3, dtype=torch.float64)
        sums = PartialSums.of(value, used, weight, torch.nn.functional.linear, -1)
        assert sums.count.item() == 2
        assert sums.second.item() == pytest.approx((1 + 9 + 4 + 9) / 2)


def test_errors_of_one_origin_add_up() -> None:
    """One rounded sum reaches the output by 64 units at once: 64 times its error, not 8 times."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(400, 1), nn.ReLU(), nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1)
    ).requires_grad_(False)
    linear(model).weight.copy_(torch.ones(1, 400))  # a sum that cancels has the larger error
    linear(model).weight[:, 200:] = -1
    for layer in (model[2], model[4]):
        assert isinstance(layer, nn.Linear)
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    inputs = torch.rand(2000, 400, generator=generator)
    deviation = sigmas(propagate_errors(layers_of(model, (400,)), inputs), model(inputs))
    assert 0.05 < np.sqrt((deviation**2).mean()) < 1
    assert deviation.max() < ALARM_SIGMAS / 4  # 8.2 by variances alone


def test_network_that_rounds_nothing_has_no_error() -> None:
    signal = propagate_errors(layers_of(nn.Sequential(nn.Flatten()), (3, 3)), torch.rand(5, 3, 3))
    assert not signal.variance.any()
