"""Stage prepare: IDX files to train, valid and test splits, stratified and without overlap."""

import math
import struct
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from mnist_batchnorm.dataset import CLASSES, SIDE, Split, save_split
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest, write_json
from mnist_batchnorm.layout import PREPARED, RAW, REPORTS
from mnist_batchnorm.params import PrepareParams, load_params

IMAGES_MAGIC = 0x0803  # unsigned bytes, three dimensions
LABELS_MAGIC = 0x0801  # unsigned bytes, one dimension


def parse_idx(content: bytes, magic: int, name: str) -> npt.NDArray[np.uint8]:
    """Decode an IDX file of unsigned bytes.

    Format: LeCun, Cortes & Burges, "The MNIST database of handwritten digits" (file formats):
    a big-endian int32 magic number whose last byte is the number of dimensions, one big-endian
    int32 for each dimension, then the bytes in row-major order.

    Args:
        content: the whole uncompressed file.
        magic: the magic number it must have, `IMAGES_MAGIC` or `LABELS_MAGIC`.
        name: what error messages call the file.

    Returns:
        uint8, ``[n, rows, columns]`` or ``[n]``.

    Raises:
        UserError: Another magic number, or a length that the dimensions do not explain.
    """
    header = struct.Struct(f">{1 + (magic & 0xFF)}i")
    if len(content) < header.size or header.unpack_from(content)[0] != magic:
        raise UserError(f"{name} is not an IDX file with magic number {magic:#06x}")
    shape = header.unpack_from(content)[1:]
    held = len(content) - header.size
    if min(shape) < 0 or math.prod(shape) != held:
        raise UserError(f"{name} says it holds {shape} bytes but holds {held}")
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


def stratified_holdout(
    labels: npt.NDArray[np.uint8], size: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Choose ``size`` images at random with the same class proportions as the whole.

    Each class gives its proportional share rounded down; the images still missing come from the
    classes with the largest remainders (Hamilton's method), lower digit first.

    Args:
        labels: uint8 ``[n]``.
        size: images to hold out, 0 to n.
        seed: of the choice.

    Returns:
        bool ``[n]``, true where held out.
    """
    counts = np.bincount(labels, minlength=CLASSES)
    quotas, remainders = np.divmod(counts * size, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: size - quotas.sum()]] += 1
    held_out = np.zeros(len(labels), dtype=np.bool_)
    generator = np.random.default_rng(seed)
    for digit, quota in enumerate(quotas):
        held_out[generator.permutation(np.flatnonzero(labels == digit))[:quota]] = True
    return held_out


def split_training_images(training: Split, test: Split, params: PrepareParams) -> dict[str, Split]:
    """Make the three splits; ``valid_size: 0`` watches the test images, as the lecture does.

    Raises:
        UserError: ``prepare.valid_size`` leaves no image to train on.
    """
    if params.valid_size >= len(training):
        raise UserError(
            f"params.yaml: prepare.valid_size: {params.valid_size} of {len(training)} training "
            "images leaves none to train on"
        )
    if params.valid_size == 0:
        return {"train": training, "valid": test, "test": test}
    held_out = stratified_holdout(training.labels, params.valid_size, params.seed)
    return {
        "train": _select(training, ~held_out),
        "valid": _select(training, held_out),
        "test": test,
    }


def _select(split: Split, chosen: npt.NDArray[np.bool_]) -> Split:
    return Split(split.images[chosen], split.labels[chosen], split.index[chosen])


def describe(splits: dict[str, Split], protocol: str) -> dict[str, Any]:
    """Summarize the splits: images per class, and the training pixels' mean and deviation."""
    # exact: sums of integers, divided once
    pixels = splits["train"].images
    total = int(pixels.sum(dtype=np.int64))
    squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))  # 255**2 fits
    mean = total / pixels.size / 255
    deviation = (squares / pixels.size / 255**2 - mean**2) ** 0.5
    return {
        "protocol": protocol,
        "images": {name: len(split) for name, split in splits.items()},
        "per_class": {
            name: {
                str(d): int(n) for d, n in enumerate(np.bincount(split.labels, minlength=CLASSES))
            }
            for name, split in splits.items()
        },
        "train_pixel_mean": mean,
        "train_pixel_std": deviation,
    }


def prepare(raw: Path, prepared: Path, metrics: Path, params: PrepareParams) -> None:
    """Write ``train``, ``valid`` and ``test.safetensors`` and the data's metrics."""
    splits = split_training_images(read_pair(raw, "train"), read_pair(raw, "t10k"), params)
    for name, split in splits.items():
        save_split(prepared / f"{name}.safetensors", split)
    protocol = (
        f"valid: {params.valid_size} training images held out"
        if params.valid_size
        else "lecture: valid is the test images, so valid figures are not independent of test"
    )
    summary = describe(splits, protocol)
    summary["sha256"] = {
        "raw": {path.name: digest(path) for path in sorted(raw.glob("*-ubyte"))},
        "prepared": {name: digest(prepared / f"{name}.safetensors") for name in splits},
    }
    write_json(metrics, summary)


@click.command()
def command() -> None:
    """Split the images into train, valid and test (data/prepared)."""
    params = load_params().prepare
    prepare(RAW, PREPARED, REPORTS / "metrics/data.json", params)
    if params.valid_size == 0:
        click.echo("valid_size is 0: the lecture's protocol, valid = the test images", err=True)
