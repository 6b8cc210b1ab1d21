"""Prepared splits on disk, and the one scaling that training, export and serving share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_bytes

CLASSES = 10
SIDE = 28  # pixels


@dataclass(frozen=True)
class Split:
    """Images with their labels and where each came from.

    Attributes:
        images: uint8 ``[n, 28, 28]``, 0 = background, 255 = full ink.
        labels: uint8 ``[n]``, the digit.
        index: int32 ``[n]``, the image's position in the IDX file it was taken from.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    index: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)


def save_split(path: Path, split: Split) -> None:
    """Write a split as safetensors; the same split gives the same bytes."""
    content = save({"images": split.images, "labels": split.labels, "index": split.index})
    write_bytes(path, content)


def load_split(path: Path) -> Split:
    """Read a split that `save_split` wrote.

    Raises:
        UserError: The file is missing, unreadable or does not hold a split.
    """
    try:
        split = Split(**load_file(path))
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro prepare` first") from None
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path} is not a prepared split: {error}") from None
    n = split.labels.size
    held = [(array.dtype.name, array.shape) for array in (split.images, split.labels, split.index)]
    if n == 0 or held != [("uint8", (n, SIDE, SIDE)), ("uint8", (n,)), ("int32", (n,))]:
        raise UserError(f"{path} is not a prepared split: it holds {held}")
    return split


def network_input(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale pixels as the networks expect them.

    Always in NumPy on the CPU: CUDA kernels divide by multiplying with a rounded reciprocal,
    which would give training on a GPU other inputs than serving.

    Args:
        images: uint8 ``[n, 28, 28]`` or ``[n, 784]``.

    Returns:
        float32 ``[n, 784]``, pixel / 255.
    """
    flat: npt.NDArray[np.float32] = images.reshape(len(images), SIDE * SIDE).astype(np.float32)
    flat /= np.float32(255)
    return flat
