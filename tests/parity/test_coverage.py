import pytest
import torch
from torch import Tensor, nn

from mnist_batchnorm.parity.coverage import (
    INPUT_LIMIT,
    ActivationCoverage,
    ActivationSide,
    find_inputs,
    unreachable_sides,
)
from mnist_batchnorm.parity.error_model import propagate_errors
from mnist_batchnorm.parity.layers import Layer
from tests.support.parity_networks import cnn, layers_of, mlp, randomized

INF = float("inf")


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def covered(layers: list[Layer], inputs: Tensor) -> ActivationCoverage:
    coverage = ActivationCoverage(layers)
    propagate_errors(layers, inputs, coverage.observe)
    return coverage


def missing(layer: nn.Linear, unit: nn.Module, inputs: list[list[float]]) -> list[str]:
    layers = layers_of(nn.Sequential(layer, unit).eval(), (layer.in_features,))
    return [str(side) for side in covered(layers, torch.tensor(inputs)).uncovered]


class TestMissing:
    def test_each_side_that_was_not_entered_is_uncovered(self) -> None:
        layer = linear([[1.0], [-1.0], [0.0]], [0.0, 0.0, 1.0])
        once = missing(layer, nn.ReLU(), [[1.0]])
        assert once == ["1[0] below 0", "1[2] below 0", "1[1] above 0"]
        assert missing(layer, nn.ReLU(), [[1.0], [-1.0]]) == ["1[2] below 0"]

    def test_remembers_earlier_inputs(self) -> None:
        layers = layers_of(nn.Sequential(linear([[1.0]], [0.0]), nn.ReLU()).eval(), (1,))
        coverage = covered(layers, torch.tensor([[1.0]]))
        propagate_errors(layers, torch.tensor([[-1.0]]), coverage.observe)
        assert coverage.uncovered == []
        assert coverage.units == 1

    def test_a_side_within_rounding_is_uncovered(self) -> None:
        layer = linear([[1.0, 1.0]], [0.0])
        cancels = [[1e6, 0.0625 - 1e6], [-1e6, 1e6 - 0.0625]]
        both = ["1[0] below 0", "1[0] above 0"]
        assert missing(layer, nn.ReLU(), cancels) == both
        assert missing(layer, nn.ReLU(), [[1.0, -0.9375], [-1.0, 0.9375]]) == []

    def test_relu6_has_three_sides(self) -> None:
        layer = linear([[1.0]], [0.0])
        assert missing(layer, nn.ReLU6(), [[-1.0], [3.0]]) == ["1[0] above 6"]
        assert missing(layer, nn.ReLU6(), [[-1.0], [7.0]]) == ["1[0] above 0"]
        assert missing(layer, nn.ReLU6(), [[-1.0], [3.0], [7.0]]) == []

    def test_a_channel_is_one_unit_at_all_positions(self) -> None:
        convolution = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            convolution.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        layers = layers_of(nn.Sequential(convolution, nn.LeakyReLU()).eval(), (1, 2, 2))
        coverage = covered(layers, torch.tensor([[[[0.0, 1.0], [-2.0, 0.0]]]]))
        assert coverage.units == 2
        assert coverage.uncovered == []
        coverage = covered(layers, torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]]))
        assert [str(side) for side in coverage.uncovered] == ["1[0] below 0", "1[1] above 0"]


class TestSearch:
    @pytest.mark.parametrize(
        ("model", "shape"),
        [
            (mlp(1, (12, 8, 8, 8, 8, 4)), (12,)),
            (cnn(1), (2, 8, 8)),
        ],
    )
    def test_enters_sides_that_one_input_leaves(
        self, model: nn.Sequential, shape: tuple[int, ...]
    ) -> None:
        layers = layers_of(model, shape)
        start = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
        coverage = covered(layers, start[:1])
        before = coverage.uncovered
        assert before
        propagate_errors(layers, find_inputs(layers, before, start), coverage.observe)
        assert len(coverage.uncovered) < len(before)

    def test_gives_finite_inputs(self) -> None:
        model = nn.Sequential(linear([[1e-30]], [-1.0]), nn.ReLU()).eval()
        found = find_inputs(
            layers_of(model, (1,)), [ActivationSide("1", 0, 0.0, INF)], torch.ones(1, 1)
        )
        assert found.abs().max() <= INPUT_LIMIT


class TestUnreachable:
    def sides(self, *modules: nn.Module, size: int = 2) -> list[str]:
        layers = layers_of(nn.Sequential(*modules).eval(), (size,))
        everything = ActivationCoverage(layers)
        propagate_errors(layers, torch.zeros(1, size), everything.observe)
        return [str(side) for side in unreachable_sides(layers, (size,), everything.uncovered)]

    def test_unit_with_only_negative_weights_on_nonnegative_inputs(self) -> None:
        hidden = linear([[1.0, 2.0], [-1.0, 1.0]], [0.0, 0.0])
        assert self.sides(hidden, nn.ReLU(), linear([[-1.0, -2.0]], [-0.5]), nn.ReLU()) == [
            "3[0] above 0"
        ]
        assert self.sides(hidden, nn.ReLU(), linear([[-1.0, 2.0]], [-0.5]), nn.ReLU()) == []
        assert self.sides(hidden, nn.LeakyReLU(), linear([[-1.0, -2.0]], [-1]), nn.ReLU()) == []

    def test_other_side_of_a_constant(self) -> None:
        norm = nn.BatchNorm1d(2)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.0, 1.0]))
            norm.bias.copy_(torch.tensor([0.7, 0.7]))
        assert self.sides(linear([[1, 2], [3, 4]], [0, 0]), norm, nn.ReLU()) == ["2[0] below 0"]

    def test_side_beyond_the_range_of_a_bounded_unit(self) -> None:
        after = linear([[1.0, -1.0]], [-7.0])
        sides = self.sides(linear([[1, 2], [3, 4]], [0, 0]), nn.ReLU6(), after, nn.ReLU())
        assert sides == ["3[0] above 0"]

    def test_a_side_that_an_input_enters_is_reachable(self) -> None:
        for seed in range(8):
            model = randomized(
                nn.Sequential(
                    nn.Conv2d(1, 3, 2),
                    nn.BatchNorm2d(3),
                    nn.PReLU(3),  # some slopes below 0 are negative
                    nn.AvgPool2d(2, 1),
                    nn.Conv2d(3, 3, 2, bias=False),
                    nn.ReLU6(),
                    nn.MaxPool2d(2, 1),
                    nn.Flatten(),
                    nn.Linear(12, 3),
                    nn.LeakyReLU(),
                ),
                seed,
            )
            layers = layers_of(model, (1, 6, 6))
            inputs = torch.randn(200, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
            nothing, some = ActivationCoverage(layers), covered(layers, inputs * 10)
            propagate_errors(layers, torch.full((1, 1, 6, 6), torch.nan), nothing.observe)
            entered = set(nothing.uncovered) - set(some.uncovered)
            assert len(nothing.uncovered) > len(entered) > 0
            assert not entered & set(unreachable_sides(layers, (1, 6, 6), nothing.uncovered))
