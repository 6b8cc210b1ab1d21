"""Train, valid and test splits."""

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import CLASSES, Split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import PrepareParams


def stratified_holdout(
    labels: npt.NDArray[np.uint8], size: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Choose ``size`` of n images at random with the class proportions of all; bool ``[n]``.

    Each class gives its proportional share rounded down; the images still missing come from the
    classes with the largest remainders (Hamilton's method), lower digit first.
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
    """Make the three splits; with ``valid_size: 0`` valid is test, as in the lecture.

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
