import pytest
import torch
from torch import Tensor, nn

from mnist_batchnorm.parity.bounds import propagate
from mnist_batchnorm.parity.exercise import LARGEST_INPUT, Exercise, Side, search, unreachable
from mnist_batchnorm.parity.layers import Layer
from tests.support.parity_networks import cnn, layers_of, mlp, randomized

INF = float("inf")


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def exercised(layers: list[Layer], inputs: Tensor) -> Exercise:
    exercise = Exercise(layers)
    propagate(layers, inputs, exercise.observe)
    return exercise


def missing(layer: nn.Linear, unit: nn.Module, inputs: list[list[float]]) -> list[str]:
    layers = layers_of(nn.Sequential(layer, unit).eval(), (layer.in_features,))
    return [str(side) for side in exercised(layers, torch.tensor(inputs)).missing]


class TestMissing:
    def test_is_each_side_of_a_unit_that_was_not_entered(self) -> None:
        layer = linear([[1.0], [-1.0], [0.0]], [0.0, 0.0, 1.0])
        once = missing(layer, nn.ReLU(), [[1.0]])
        assert once == ["1[0] below 0", "1[2] below 0", "1[1] above 0"]
        assert missing(layer, nn.ReLU(), [[1.0], [-1.0]]) == ["1[2] below 0"]

    def test_knows_what_earlier_inputs_entered(self) -> None:
        layers = layers_of(nn.Sequential(linear([[1.0]], [0.0]), nn.ReLU()).eval(), (1,))
        exercise = exercised(layers, torch.tensor([[1.0]]))
        propagate(layers, torch.tensor([[-1.0]]), exercise.observe)
        assert exercise.missing == []
        assert exercise.units == 1

    def test_is_a_side_that_only_noise_may_have_entered(self) -> None:
        layer = linear([[1.0, 1.0]], [0.0])
        cancels = [[1e6, 0.0625 - 1e6], [-1e6, 1e6 - 0.0625]]
        both = ["1[0] below 0", "1[0] above 0"]
        assert missing(layer, nn.ReLU(), cancels) == both
        assert missing(layer, nn.ReLU(), [[1.0, -0.9375], [-1.0, 0.9375]]) == []

    def test_of_relu6_may_be_one_of_three(self) -> None:
        layer = linear([[1.0]], [0.0])
        assert missing(layer, nn.ReLU6(), [[-1.0], [3.0]]) == ["1[0] above 6"]
        assert missing(layer, nn.ReLU6(), [[-1.0], [7.0]]) == ["1[0] above 0"]
        assert missing(layer, nn.ReLU6(), [[-1.0], [3.0], [7.0]]) == []

    def test_counts_a_channel_as_one_unit_wherever_it_is_on(self) -> None:
        convolution = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            convolution.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        layers = layers_of(nn.Sequential(convolution, nn.LeakyReLU()).eval(), (1, 2, 2))
        exercise = exercised(layers, torch.tensor([[[[0.0, 1.0], [-2.0, 0.0]]]]))
        assert exercise.units == 2
        assert exercise.missing == []
        exercise = exercised(layers, torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]]))
        assert [str(side) for side in exercise.missing] == ["1[0] below 0", "1[1] above 0"]


class TestSearch:
    @pytest.mark.parametrize(
        ("model", "shape"),
        [
            (mlp(1, (12, 8, 8, 8, 8, 4)), (12,)),
            (cnn(1), (2, 8, 8)),
        ],
    )
    def test_enters_what_one_input_leaves(
        self, model: nn.Sequential, shape: tuple[int, ...]
    ) -> None:
        layers = layers_of(model, shape)
        start = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
        exercise = exercised(layers, start[:1])
        before = exercise.missing
        assert before
        propagate(layers, search(layers, before, start), exercise.observe)
        assert len(exercise.missing) < len(before)

    def test_gives_finite_inputs(self) -> None:
        model = nn.Sequential(linear([[1e-30]], [-1.0]), nn.ReLU()).eval()
        found = search(layers_of(model, (1,)), [Side("1", 0, 0.0, INF)], torch.ones(1, 1))
        assert found.abs().max() <= LARGEST_INPUT


class TestUnreachable:
    def sides(self, *modules: nn.Module, size: int = 2) -> list[str]:
        layers = layers_of(nn.Sequential(*modules).eval(), (size,))
        everything = Exercise(layers)
        propagate(layers, torch.zeros(1, size), everything.observe)
        return [str(side) for side in unreachable(layers, (size,), everything.missing)]

    def test_is_a_unit_with_only_negative_weights_on_units_that_are_never_negative(self) -> None:
        hidden = linear([[1.0, 2.0], [-1.0, 1.0]], [0.0, 0.0])
        assert self.sides(hidden, nn.ReLU(), linear([[-1.0, -2.0]], [-0.5]), nn.ReLU()) == [
            "3[0] above 0"
        ]
        assert self.sides(hidden, nn.ReLU(), linear([[-1.0, 2.0]], [-0.5]), nn.ReLU()) == []
        assert self.sides(hidden, nn.LeakyReLU(), linear([[-1.0, -2.0]], [-1]), nn.ReLU()) == []

    def test_is_the_other_side_of_a_constant(self) -> None:
        norm = nn.BatchNorm1d(2)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.0, 1.0]))
            norm.bias.copy_(torch.tensor([0.7, 0.7]))
        assert self.sides(linear([[1, 2], [3, 4]], [0, 0]), norm, nn.ReLU()) == ["2[0] below 0"]

    def test_is_beyond_what_a_bounded_unit_gives(self) -> None:
        after = linear([[1.0, -1.0]], [-7.0])
        sides = self.sides(linear([[1, 2], [3, 4]], [0, 0]), nn.ReLU6(), after, nn.ReLU())
        assert sides == ["3[0] above 0"]

    def test_is_never_a_side_that_an_input_enters(self) -> None:
        for seed in range(20):
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
            nothing, some = Exercise(layers), exercised(layers, inputs * 10)
            propagate(layers, torch.full((1, 1, 6, 6), torch.nan), nothing.observe)
            entered = set(nothing.missing) - set(some.missing)
            assert len(nothing.missing) > len(entered) > 0
            assert not entered & set(unreachable(layers, (1, 6, 6), nothing.missing))
