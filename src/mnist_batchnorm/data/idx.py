"""IDX files, MNIST's format."""

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE, Split
from mnist_batchnorm.core.errors import UserError

IMAGES_MAGIC = 0x0803  # unsigned bytes, three dimensions
LABELS_MAGIC = 0x0801  # unsigned bytes, one dimension


def parse_idx(content: bytes, magic: int, name: str) -> npt.NDArray[np.uint8]:
    """Decode an IDX file of unsigned bytes: uint8 ``[n, rows, columns]`` or ``[n]``.

    Format: LeCun, Cortes & Burges, "The MNIST database of handwritten digits" (file formats):
    a big-endian int32 magic number whose last byte is the number of dimensions, one big-endian
    int32 for each dimension, then the bytes in row-major order.

    Raises:
        UserError: The magic number is wrong, or the length does not fit the dimensions.
    """
    header = struct.Struct(f">{1 + (magic & 0xFF)}i")
    if len(content) < header.size or header.unpack_from(content)[0] != magic:
        raise UserError(f"{name} is not an IDX file with magic number {magic:#06x}")
    shape = header.unpack_from(content)[1:]
    size = len(content) - header.size
    if min(shape) < 0 or math.prod(shape) != size:
        raise UserError(f"{name} says it holds {shape} bytes but holds {size}")
    return np.frombuffer(content, dtype=np.uint8, offset=header.size).reshape(shape)


def read_pair(raw: Path, stem: str) -> Split:
    """Read ``<stem>-images`` and ``<stem>-labels`` from the folder of raw files.

    Raises:
        UserError: A file is missing or malformed, the two differ in length, or they do not hold
            28 x 28 images of ten classes.
    """
    arrays = []
    for kind, magic in (("images-idx3", IMAGES_MAGIC), ("labels-idx1", LABELS_MAGIC)):
        path = raw / f"{stem}-{kind}-ubyte"
        try:
            arrays.append(parse_idx(path.read_bytes(), magic, str(path)))
        except FileNotFoundError:
            raise UserError(f"no {path}; run `dvc repro download` first") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    images, labels = arrays
    if images.shape != (len(labels), SIDE, SIDE) or len(labels) == 0:
        raise UserError(
            f"{raw}/{stem}-*: images {images.shape} and labels {labels.shape} do not make "
            f"a set of {SIDE} x {SIDE} images"
        )
    if labels.max() >= CLASSES:
        raise UserError(f"{raw}/{stem}-labels: label {labels.max()}, expected 0 to {CLASSES - 1}")
    return Split(images, labels, np.arange(len(labels), dtype=np.int32))
