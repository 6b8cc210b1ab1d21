"""Stage prepare: IDX files to train, valid and test splits, stratified and without overlap."""

from pathlib import Path
from typing import Any

import click
import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES, Split, save_split
from mnist_batchnorm.core.files import digest, write_json
from mnist_batchnorm.core.params import PrepareParams, load_params
from mnist_batchnorm.core.paths import PREPARED, RAW, REPORTS
from mnist_batchnorm.data.idx import read_pair
from mnist_batchnorm.data.split import split_training_images


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
