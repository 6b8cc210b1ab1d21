"""Prepared splits, ``data/prepared/*.safetensors``, and the networks' input scaling."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_bytes

CLASSES = 10
SIDE = 28  # pixels


@dataclass(frozen=True)
class Split:
    """Images with their labels and positions."""

    images: npt.NDArray[np.uint8]  # [n, 28, 28], 0 = background, 255 = full ink
    labels: npt.NDArray[np.uint8]  # [n], the digit
    index: npt.NDArray[np.int32]  # [n], position in the IDX file

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
    return load_hashed_split(path)[0]


def load_hashed_split(path: Path) -> tuple[Split, str]:
    """Read a split as `load_split`, and return it with the SHA-256 of the bytes read."""
    try:
        content = path.read_bytes()
        split = Split(**load(content))
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro prepare` first") from None
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path} is not a prepared split: {error}") from None
    n = split.labels.size
    arrays = [(array.dtype.name, array.shape) for array in vars(split).values()]
    if n == 0 or arrays != [("uint8", (n, SIDE, SIDE)), ("uint8", (n,)), ("int32", (n,))]:
        raise UserError(f"{path} is not a prepared split: it holds {arrays}")
    return split, sha256(content).hexdigest()


def network_input(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale uint8 images ``[n, 28, 28]`` or ``[n, 784]`` to pixel / 255, float32 ``[n, 784]``."""
    # In NumPy on the CPU: CUDA kernels multiply by a rounded reciprocal instead of dividing,
    # which would give training on a GPU other inputs than serving.
    flat: npt.NDArray[np.float32] = images.reshape(len(images), SIDE * SIDE).astype(np.float32)
    flat /= np.float32(255)
    return flat
