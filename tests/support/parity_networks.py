"""Small networks with random numbers in every place, and ONNX graphs of them, node by node.

Written without an exporter: fast, and every fault that a test needs can be put in by hand.
"""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mnist_batchnorm.parity.layers import Layer, list_layers

Shape = tuple[int, ...]


def randomized(model: nn.Sequential, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Give a network in eval mode random numbers throughout, batch norm's included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.3, 2.0, generator=generator)
            elif tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.normal_(0, gain / fan_in**0.5, generator=generator)
    return model.eval()


def mlp(seed: int = 0, widths: Shape = (12, 8, 6, 4), gain: float = 1.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths[:-1]):
        layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU()]
    return randomized(nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])), seed, gain)


def cnn(seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """A little of every kind of layer; takes ``[n, 2, 8, 8]``."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.Conv2d(4, 6, 3, bias=False, groups=2),
        nn.BatchNorm2d(6, affine=False),
        nn.PReLU(6),
        nn.MaxPool2d(2, 1, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6, 5),
    )
    return randomized(model, seed, gain)


def layers_of(model: nn.Sequential, shape: Shape) -> list[Layer]:
    layers, problems = list_layers(model, shape)
    assert not problems
    return layers


def folded(model: nn.Sequential) -> nn.Sequential:
    """Fold each batch norm into the layer before it as exporters do, in float32."""
    layers: list[nn.Module] = []
    for previous, module in pairwise([None, *model]):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and isinstance(
            previous, nn.Linear | nn.Conv2d
        ):
            before = layers[-1]
            assert isinstance(before, nn.Linear | nn.Conv2d)
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                gamma, beta = (module.weight, module.bias) if module.affine else (1.0, 0.0)
                scale = gamma / torch.sqrt(module.running_var + module.eps)
                before.weight *= scale.reshape(-1, *[1] * (before.weight.dim() - 1))
                bias = torch.zeros(len(scale)) if before.bias is None else before.bias
                before.bias = nn.Parameter((bias - module.running_mean) * scale + beta)
        elif module is not None:
            layers.append(copy.deepcopy(module))
    return nn.Sequential(*layers)


def to_onnx(model: nn.Sequential, shape: Shape) -> onnx.ModelProto:
    """Write a network in eval mode as a graph ``x`` -> ``y`` with a symbolic batch axis."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    layers = layers_of(model, shape)
    for i, layer in enumerate(layers):
        operator, attributes, arrays = _operator(layer.module)
        names = [f"{layer.name}.{k}" for k in range(len(arrays))]
        tensors += map(numpy_helper.from_array, arrays, names)
        given = f"t{i}" if i else "x"
        result = "y" if i == len(layers) - 1 else f"t{i + 1}"
        nodes.append(helper.make_node(operator, [given, *names], [result], **attributes))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *layers[-1].shape])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def append(graph: onnx.ModelProto, *nodes: onnx.NodeProto, **constants: object) -> onnx.ModelProto:
    """Let a graph's output ``y`` pass more nodes, the last of which gives ``z``."""
    changed = copy.deepcopy(graph)
    changed.graph.node.extend(nodes)
    for name, value in constants.items():
        changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    changed.graph.output[0].name = "z"
    changed.graph.output[0].type.tensor_type.ClearField("shape")
    return changed


def _operator(module: nn.Module) -> tuple[str, dict[str, Any], list[np.ndarray]]:
    attributes: dict[str, Any] = {}
    tensors: list[torch.Tensor | None] = []
    match module:
        case nn.Linear():
            operator, attributes = "Gemm", {"transB": 1}
            tensors = [module.weight, module.bias]
        case nn.Conv2d():
            assert not isinstance(module.padding, str)
            operator, attributes = "Conv", {"strides": module.stride, "group": module.groups}
            attributes["pads"] = [*module.padding, *module.padding]
            tensors = [module.weight, module.bias]
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            operator, attributes = "BatchNormalization", {"epsilon": module.eps}
            ones = torch.ones(module.num_features)
            tensors = [module.weight, module.bias] if module.affine else [ones, 0 * ones]
            tensors += [module.running_mean, module.running_var]
        case nn.LeakyReLU():
            operator, attributes = "LeakyRelu", {"alpha": module.negative_slope}
        case nn.PReLU():
            operator, tensors = "PRelu", [module.weight.reshape(-1, 1, 1)]
        case nn.ReLU6():
            operator, tensors = "Clip", [torch.tensor(0.0), torch.tensor(6.0)]
        case nn.MaxPool2d():
            operator, attributes = "MaxPool", _window(module)
        case nn.AvgPool2d():
            operator, attributes = "AveragePool", _window(module)
            attributes["count_include_pad"] = int(module.count_include_pad)
        case nn.AdaptiveAvgPool2d():
            operator = "GlobalAveragePool"
        case nn.Flatten():
            operator = "Flatten"
        case _:
            assert isinstance(module, nn.ReLU)
            operator = "Relu"
    return operator, attributes, [t.detach().numpy() for t in tensors if t is not None]


def _window(module: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        "kernel_shape": 2 * [module.kernel_size],
        "strides": 2 * [module.stride],
        "pads": 4 * [module.padding],
    }
