"""The layers that the gate can judge: an nn.Sequential, flattened."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

OPERATORS: dict[type[nn.Module], str] = {  # ONNX operator of each layer type that is supported
    nn.Linear: "Linear",
    nn.Conv2d: "Conv",
    nn.BatchNorm1d: "BatchNormalization",
    nn.BatchNorm2d: "BatchNormalization",
    nn.ReLU: "Relu",
    nn.ReLU6: "Clip",
    nn.LeakyReLU: "LeakyRelu",
    nn.PReLU: "PRelu",
    nn.MaxPool2d: "MaxPool",
    nn.AvgPool2d: "AveragePool",
    nn.AdaptiveAvgPool2d: "GlobalAveragePool",
    nn.Flatten: "Flatten",
}
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
LinearOrConv = nn.Linear | nn.Conv2d  # layers into which a batch norm right after can be folded
NO_EFFECT = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity}  # in eval mode


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes:
        name: prefix of its parameters in the ``state_dict``: ``bn1``.
        module: the layer with its weights, in eval mode.
        shape: shape of one output, without the batch axis.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]


def list_layers(
    model: nn.Sequential, input_shape: tuple[int, ...]
) -> tuple[list[Layer], list[str]]:
    """List a network's layers in order, without those that have no effect in eval mode.

    Args:
        model: network in eval mode, on the CPU; may contain other nn.Sequential.
        input_shape: shape of one input, without the batch axis.

    Returns:
        The layers, and a text for each that the gate cannot judge.

    Raises:
        RuntimeError: The network does not accept inputs of that shape.
    """
    layers = []
    value = torch.zeros(1, *input_shape)
    with torch.inference_mode():
        for name, module in _flatten(model, ""):
            value = module(value)
            if type(module) not in NO_EFFECT:
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
    """Return why the gate cannot judge a layer; empty if it can."""
    match module:
        case _ if type(module) not in OPERATORS:  # a subclass may compute anything
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
