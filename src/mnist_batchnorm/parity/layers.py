"""Which networks the gate knows: the layers of an nn.Sequential, one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

KNOWN = {
    nn.Linear,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
}
WITHOUT_EFFECT = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity}  # in eval mode


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes:
        name: in the ``state_dict``, without a parameter's own name: ``bn1``.
        module: it, in eval mode, with its weights.
        shape: of one output, without the batch axis.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]


def list_layers(
    model: nn.Sequential, input_shape: tuple[int, ...]
) -> tuple[list[Layer], list[str]]:
    """List a network's layers that compute something in eval mode, in order.

    Args:
        model: in eval mode, on the CPU; it may hold other nn.Sequential.
        input_shape: of one input, without the batch axis.

    Returns:
        The layers, and what the gate cannot judge about them: empty, or a text for each layer.

    Raises:
        RuntimeError: The network does not take inputs of that shape.
    """
    layers = []
    value = torch.zeros(1, *input_shape)
    with torch.inference_mode():
        for name, module in _flatten(model, ""):
            value = module(value)
            if type(module) not in WITHOUT_EFFECT:
                layers.append(Layer(name, module, tuple(value.shape[1:])))
    problems = [
        f"{layer.name} ({type(layer.module).__name__}) {problem}"
        for layer in layers
        if (problem := unsupported(layer.module))
    ]
    return layers, problems


def _flatten(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if type(module) is nn.Sequential:
            yield from _flatten(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def unsupported(module: nn.Module) -> str:
    """Say what keeps the gate from judging a layer; empty when nothing does.

    Beyond `KNOWN`: batch norm keeps running statistics, padding is a number of zeros, adaptive
    pooling is to one pixel, Flatten begins at the first axis after the batch. A subclass may
    compute anything, and so is not known.
    """
    match module:
        case _ if type(module) not in KNOWN:
            problem = "is not a layer the gate knows"
        case nn.Conv2d() if module.padding_mode != "zeros" or isinstance(module.padding, str):
            problem = "pads with something else than a number of zeros"
        case nn.BatchNorm1d() | nn.BatchNorm2d() if module.running_var is None:
            problem = "keeps no running statistics"
        case nn.MaxPool2d() if module.return_indices:
            problem = "returns indices"
        case nn.AvgPool2d() if module.divisor_override is not None:
            problem = "overrides its divisor"
        case nn.AdaptiveAvgPool2d() if module.output_size not in {1, (1, 1)}:
            problem = "pools to more than one pixel"
        case nn.Flatten() if (module.start_dim, module.end_dim) != (1, -1):
            problem = "keeps some axes"
        case _:
            problem = ""
    return problem
