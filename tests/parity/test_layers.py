import pytest
import torch
from torch import nn

from mnist_batchnorm.parity.layers import list_layers


def test_nested_networks_are_flattened_without_layers_that_have_no_effect() -> None:
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(inner, nn.Identity(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3))
    layers, problems = list_layers(model.eval(), (1, 8, 8))
    assert [layer.name for layer in layers] == ["0.0", "0.1", "0.2", "2", "4"]
    assert [layer.shape for layer in layers] == [*[(4, 6, 6)] * 3, (144,), (3,)]
    assert not problems


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (nn.Sigmoid(), "Sigmoid) is not a layer the gate knows"),
        (type("MyReLU", (nn.ReLU,), {})(), "MyReLU) is not a layer the gate knows"),
        (nn.Conv2d(2, 2, 3, padding_mode="circular", padding=1), "something else than a number"),
        (nn.Conv2d(2, 2, 3, padding="same"), "something else than a number"),
        (nn.BatchNorm2d(2, track_running_stats=False), "keeps no running statistics"),
        (nn.AvgPool2d(2, divisor_override=3), "overrides its divisor"),
        (nn.AdaptiveAvgPool2d(2), "pools to more than one pixel"),
        (nn.Flatten(0), "keeps some axes"),
    ],
)
def test_unsupported_layer_is_named(layer: nn.Module, problem: str) -> None:
    _, problems = list_layers(nn.Sequential(nn.ReLU(), layer).eval(), (2, 4, 4))
    assert len(problems) == 1
    assert problems[0].startswith("1 (")
    assert problem in problems[0]


def test_pooling_that_returns_indices() -> None:
    _, problems = list_layers(nn.Sequential(nn.MaxPool2d(2, return_indices=False)), (1, 4, 4))
    assert not problems


def test_inputs_of_another_shape() -> None:
    with pytest.raises(RuntimeError):
        list_layers(nn.Sequential(nn.Linear(3, 2)), (4,))
    assert torch.is_grad_enabled()
