"""Checkpoints, ``models/*.safetensors``, as NumPy reads them: `network.model` needs PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import CHECKPOINT_KEY


@dataclass(frozen=True)
class LayerStatistics:
    """One batch-norm layer; each array has one value per unit."""

    mean: Float64  # running mean of the input
    deviation: Float64  # square root of the running variance
    scale: Float64  # learned gamma, the deviation of the output
    shift: Float64  # learned beta, the mean of the output


def read_layers(path: Path) -> dict[str, LayerStatistics]:
    """Read each batch-norm layer's statistics and learned scale and shift from a checkpoint.

    Raises:
        UserError: The file is missing or unreadable, or a layer lacks one of the four.
    """
    suffix = ".running_mean"
    try:
        tensors = {name: t.astype(np.float64) for name, t in load_file(path).items()}
        return {
            (layer := name.removesuffix(suffix)): LayerStatistics(
                mean=mean,
                deviation=np.sqrt(tensors[f"{layer}.running_var"]),
                scale=tensors[f"{layer}.weight"],
                shift=tensors[f"{layer}.bias"],
            )
            for name, mean in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0]))
            if name.endswith(suffix)
        }
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro train` first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of this project: it lacks {error}") from None


def read_train_sha256(checkpoint: Path) -> str:
    """Read the SHA-256 of a checkpoint's training images from its metadata.

    Raises:
        UserError: The file is missing or is not a checkpoint of this project.
    """
    try:
        with safe_open(checkpoint, "np") as stored:
            metadata = json.loads((stored.metadata() or {})[CHECKPOINT_KEY])
        return str(metadata["provenance"]["train_sha256"])
    except FileNotFoundError:
        raise UserError(f"no {checkpoint}; run `dvc repro train` first") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint of this project: {type(error).__name__}: {error}"
        ) from None
