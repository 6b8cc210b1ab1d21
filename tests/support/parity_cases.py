"""Trained networks, what they are fed, and their honest exports: what the suite's files start from.

A case is a network of known layers after a few steps of training on the slice of MNIST in
tests/fixtures: long enough for every weight, scale, shift and running statistic to have moved.
"""

import copy
import gzip
import hashlib
import io
import logging
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from safetensors.torch import save_file
from torch import nn

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.network.model import Architecture

Array = npt.NDArray[Any]
State = dict[str, torch.Tensor]

SLICE = Path(__file__).parents[1] / "fixtures/mnist"
INPUT, OUTPUT = "image", "logits"
OPSET = 20
STEPS, BATCH = 40, 64  # of training


def mlp() -> nn.Sequential:
    """The project's own kind of network, small."""
    return Architecture((784, 32, 32, 10), batch_norm=True).build()


def cnn() -> nn.Sequential:
    """A little of everything that the gate knows."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            bn1=nn.BatchNorm2d(8),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 12, 3, stride=2, bias=False),
            bn2=nn.BatchNorm2d(12),
            relu2=nn.LeakyReLU(0.01),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.2),
            linear1=nn.Linear(108, 24),
            bn3=nn.BatchNorm1d(24),
            relu3=nn.ReLU6(),
            linear2=nn.Linear(24, 10),
        )
    )


NETWORKS = {"mlp": (mlp, (784,)), "cnn": (cnn, (1, 28, 28))}


@dataclass(frozen=True, eq=False)
class Case:
    """A network as training left it.

    Attributes:
        name: of its architecture, in `NETWORKS`.
        model: it, in eval mode, with the weights that the file holds.
        earlier: the weights of half the training.
        weights: the safetensors file of its ``state_dict``.
        inputs: float32 ``[500, ...]``, the slice's test images.
        labels: uint8 ``[500]``.
    """

    name: str
    seed: int
    gain: float
    model: nn.Sequential
    earlier: State
    weights: Path
    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    architecture: nn.Sequential = field(init=False)

    def __post_init__(self) -> None:
        # other numbers than the file's: who judges the case must read them from the file
        object.__setattr__(self, "architecture", NETWORKS[self.name][0]())

    @property
    def state(self) -> State:
        """A copy of the weights, to be changed."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    @property
    def layers(self) -> dict[str, nn.Module]:
        return dict(self.model.named_children())

    @cached_property
    def linear(self) -> list[str]:
        """The layers that multiply by weights, in order."""
        return [n for n, m in self.layers.items() if isinstance(m, nn.Linear | nn.Conv2d)]

    @cached_property
    def normalized(self) -> dict[str, str]:
        """The layers that a batch norm follows -> that batch norm."""
        names = list(self.layers)
        return {
            name: names[i + 1] for i, name in enumerate(names[:-1]) if names[i + 1].startswith("bn")
        }

    @cached_property
    def largest(self) -> str:
        """The name of the largest weight."""
        return max((f"{n}.weight" for n in self.linear), key=lambda n: self.state[n].numel())

    def model_with(self, state: Mapping[str, torch.Tensor]) -> nn.Sequential:
        """The network with other weights, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        return model

    @cached_property
    def other_run(self) -> nn.Sequential:
        """The same training from another seed."""
        return train_network(self.name, self.seed + 100, self.gain)[0]

    # the exporters, each asked once; every call returns a graph of its own to be changed

    def kept(self) -> onnx.ModelProto:
        """PyTorch's current exporter, batch norm kept."""
        return onnx.load_from_string(self._kept)

    def folded(self) -> onnx.ModelProto:
        """PyTorch's current exporter, batch norm folded."""
        return onnx.load_from_string(self._folded)

    def legacy(self) -> onnx.ModelProto:
        """PyTorch's exporter by tracing, in eval mode."""
        return onnx.load_from_string(self._legacy)

    @cached_property
    def _kept(self) -> bytes:
        return bytes(dynamo_export(self.model, self.inputs, fold=False).SerializeToString())

    @cached_property
    def _folded(self) -> bytes:
        return bytes(dynamo_export(self.model, self.inputs, fold=True).SerializeToString())

    @cached_property
    def _legacy(self) -> bytes:
        return bytes(legacy_export(self.model, self.inputs).SerializeToString())


@cache
def load_slice(split: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """The slice's ``train`` or ``t10k`` images, as the networks take them, and labels."""
    images, labels = (
        np.frombuffer(gzip.decompress((SLICE / f"{split}-{name}.gz").read_bytes()), np.uint8)
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return network_input(images[16:].reshape(-1, 784)), labels[8:].copy()


def make_case(name: str, seed: int, gain: float, folder: Path) -> Case:
    """Train a network and write its weights to a folder.

    Args:
        name: of the architecture.
        seed: of the initial weights and the order of the images.
        gain: factor of the initial weights; 4 gives saturated, badly conditioned layers.
        folder: where the safetensors file goes.
    """
    model, earlier = train_network(name, seed, gain)
    weights = folder / f"{name}-{seed}-x{gain:g}.safetensors"
    save_file(model.state_dict(), weights)
    images, labels = load_slice("t10k")
    inputs = images.reshape(-1, *NETWORKS[name][1])
    return Case(name, seed, gain, model, earlier, weights, inputs, labels)


def train_network(name: str, seed: int, gain: float) -> tuple[nn.Sequential, State]:
    """Train a network for `STEPS` steps; return it and its weights of half the way."""
    build, shape = NETWORKS[name]
    images, labels = load_slice("train")
    inputs, targets = torch.from_numpy(images).reshape(-1, *shape), torch.from_numpy(labels).long()
    earlier: State = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build().train()
        for module in model:
            reset(module, gain)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            if step == STEPS // 2:
                earlier = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            batch = torch.randint(len(inputs), (BATCH,))
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval(), earlier


def reset(module: nn.Module, gain: float) -> None:
    """Draw a layer's initial weights; batch norm's not as the ones and zeros it starts with."""
    with torch.no_grad():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
            module.weight *= gain
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)


def provenance(content: bytes) -> dict[str, str]:
    """What an ONNX file of a checkpoint's bytes says about it."""
    return {"mnist_batchnorm.weights_sha256": hashlib.sha256(content).hexdigest()}


def dynamo_export(
    model: nn.Module, inputs: Array, fold: bool, batch: int | None = None, opset: int = OPSET
) -> onnx.ModelProto:
    """Ask PyTorch's current exporter; a ``batch`` leaves the dynamic axis out, as many do."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it suggests installing torchvision
    program = torch.onnx.export(
        model,
        (torch.from_numpy(inputs[: batch or 2]),),
        dynamo=True,
        optimize=fold,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def legacy_export(
    model: nn.Module,
    inputs: Array,
    mode: torch.onnx.TrainingMode = torch.onnx.TrainingMode.EVAL,
    fold: bool = False,
) -> onnx.ModelProto:
    """Ask the exporter that traces; most exports in production are its."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # all of that exporter is deprecated
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "ONNX Preprocess", UserWarning)
        torch.onnx.export(
            model,
            (torch.from_numpy(inputs[:2]),),
            content,  # type: ignore[arg-type]  # a stream will do for this exporter
            dynamo=False,
            training=mode,
            do_constant_folding=fold,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
    return onnx.load_from_string(content.getvalue())
