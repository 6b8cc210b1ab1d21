"""Summary of the prepared splits."""

from collections.abc import Mapping

import numpy as np

from mnist_batchnorm.artifacts.data_summary import DataSummary
from mnist_batchnorm.artifacts.splits import CLASSES, Split


def summarize(
    splits: Mapping[str, Split], protocol: str, sha256: dict[str, dict[str, str]]
) -> DataSummary:
    """Count the images per split and class, and compute the training pixels' moments."""
    # exact: sums of integers, divided once
    pixels = splits["train"].images
    total = int(pixels.sum(dtype=np.int64))
    squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))  # 255**2 fits
    mean = total / pixels.size / 255
    return DataSummary(
        protocol=protocol,
        images={name: len(split) for name, split in splits.items()},
        per_class={
            name: dict(enumerate(np.bincount(split.labels, minlength=CLASSES).tolist()))
            for name, split in splits.items()
        },
        train_pixel_mean=mean,
        train_pixel_std=(squares / pixels.size / 255**2 - mean**2) ** 0.5,
        sha256=sha256,
    )
