"""The lecture's two networks, and the checkpoints that hold them."""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_bytes
from mnist_batchnorm.core.paths import CHECKPOINT_KEY


@dataclass(frozen=True)
class Architecture:
    """A multilayer perceptron, with or without batch norm before each ReLU.

    Attributes:
        widths: units of the input, each hidden layer and the output.
        batch_norm: whether there is a BatchNorm1d between each hidden Linear and its ReLU
            (Ioffe & Szegedy 2015, section 3.2).
        bn_momentum: weight of the newest batch in the running statistics.
        bn_eps: added to the variance before the square root.
    """

    widths: tuple[int, ...]
    batch_norm: bool
    bn_momentum: float = 0.1
    bn_eps: float = 1e-5

    def build(self, seed: int = 0) -> nn.Sequential:
        """Make the network with PyTorch's default initial weights.

        Batch norm draws no random number, so both variants start from the same linear layers.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's: torch.manual_seed seeds all
            for i in range(1, len(self.widths) - 1):
                layers[f"linear{i}"] = nn.Linear(self.widths[i - 1], self.widths[i])
                if self.batch_norm:
                    layers[f"bn{i}"] = nn.BatchNorm1d(
                        self.widths[i], eps=self.bn_eps, momentum=self.bn_momentum
                    )
                layers[f"relu{i}"] = nn.ReLU()
            layers[f"linear{len(self.widths) - 1}"] = nn.Linear(self.widths[-2], self.widths[-1])
        return nn.Sequential(layers)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file: ``state`` is the ``state_dict``, on the CPU.

    ``provenance`` has the variant, the SHA-256 of the training images, parameters and device;
    ``sha256`` is the hash of the file it was read from, empty if it was not read from a file.
    """

    architecture: Architecture
    state: dict[str, Tensor]
    provenance: dict[str, Any]
    sha256: str = field(default="", compare=False)

    def model(self) -> nn.Sequential:
        """Rebuild the network on the CPU, in eval mode; a UserError if the weights do not fit."""
        model = self.architecture.build()
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise UserError(f"the checkpoint's weights do not fit its network: {error}") from None
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors; the same checkpoint gives the same bytes."""
    metadata = {
        "architecture": asdict(checkpoint.architecture),
        "provenance": checkpoint.provenance,
    }
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.state.items()}
    # one key only: safetensors writes several in random order
    write_bytes(path, save(tensors, {CHECKPOINT_KEY: json.dumps(metadata, sort_keys=True)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        UserError: The file is missing, is not safetensors, or is not one of this project's.
    """
    try:
        content = path.read_bytes()  # once, so that the hash is that of these weights
        state = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {})[CHECKPOINT_KEY])
        architecture = _parse_architecture(metadata["architecture"])
        foreign = [n for n, t in state.items() if t.dtype not in {torch.float32, torch.int64}]
        if foreign:
            raise ValueError(f"{', '.join(foreign)} not float32")
        provenance = dict(metadata.get("provenance", {}))
        return Checkpoint(architecture, state, provenance, sha256(content).hexdigest())
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro train` first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a checkpoint of this project: {type(error).__name__}: {error}"
        ) from None


def _parse_architecture(stored: dict[str, Any]) -> Architecture:
    widths = tuple(int(width) for width in stored["widths"])
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths {widths}")
    for key in ("bn_momentum", "bn_eps"):
        if not isinstance(stored.get(key, 0.0), float):
            raise TypeError(f"{key} {stored[key]!r}")
    return Architecture(**stored | {"widths": widths})


def load_variant(variant: str, weights: Path) -> Checkpoint:
    """Read the checkpoint of one of the two networks; a UserError if it is the other's."""
    checkpoint = load_checkpoint(weights)
    if checkpoint.architecture.batch_norm != (variant == "bn"):
        holds = "with" if checkpoint.architecture.batch_norm else "without"
        raise UserError(
            f"{weights} holds the network {holds} batch norm, expected {variant}; "
            "run `dvc repro train`"
        )
    return checkpoint
