"""Compare outputs of the exported networks with the pinned ones.

Two trainings of the same accuracy can disagree on many images; logits of fixed images show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mnist_batchnorm.artifacts.goldens import (
    GOLDEN_FILES,
    PinnedOutputs,
    pinned_images,
    read_pinned_outputs,
)
from mnist_batchnorm.artifacts.splits import Split, network_input
from mnist_batchnorm.core.arrays import Float32, Float64, relative_change
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.promotion.onnx_model import OnnxModel

BATCH_SIZES = (64, 32, 7, 2, 1)

# Largest relative change of a row's logits that is still rounding: honest files were measured
# within 1.6e-6 of float64 arithmetic on these images, the plain network being the worst, so two of
# them are within 3.2e-6 of each other.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class changed; for the margins see `margins`."""

    index: int  # position in MNIST's test file
    label: int  # actual class
    before: int  # pinned prediction
    after: int  # present prediction
    margin_before: float
    margin_after: float


@dataclass(frozen=True)
class Comparison:
    """How logits differ from the pinned ones; changes are relative, see `relative_change`."""

    batch_size: int  # at which the logits were computed
    max_change: float
    median_change: float
    images_beyond: int  # number of images that changed by more than `TOLERANCE`
    right_before: int  # number of right pinned predictions
    right_after: int  # number of right present predictions
    flips: tuple[Flip, ...]

    @property
    def same(self) -> bool:
        """Whether the outputs differ by rounding only."""
        return not self.images_beyond and not self.flips


def margins(logits: Float32) -> Float64:
    """Return the largest logit of each row minus the second largest, ``[n]``."""
    second, first = np.sort(logits.astype(np.float64), axis=1)[:, -2:].T
    difference: Float64 = first - second
    return difference


def compare(pinned: Float32, logits: Float32, split: Split, batch_size: int) -> Comparison:
    """Compare finite logits of the golden images with the pinned ones, both ``[n, 10]``."""
    change = relative_change(pinned, logits)
    before, after = pinned.argmax(axis=1), logits.argmax(axis=1)
    columns = (split.index, split.labels, before, after, margins(pinned), margins(logits))
    return Comparison(
        batch_size=batch_size,
        max_change=float(change.max()),
        median_change=float(np.median(change)),
        images_beyond=int((change > TOLERANCE).sum()),
        right_before=int((before == split.labels).sum()),
        right_after=int((after == split.labels).sum()),
        flips=tuple(
            Flip(*(column[i].item() for column in columns)) for i in np.flatnonzero(before != after)
        ),
    )


def worst_comparison(model: OnnxModel, pinned: PinnedOutputs, split: Split) -> Comparison:
    """Run a model on the golden images at each of `BATCH_SIZES`; return the worst comparison.

    Raises:
        CheckFailedError: The model does not run on the golden images.
    """
    inputs = network_input(split.images)
    comparisons = (
        compare(pinned.logits, model.logits(inputs, size), split, size) for size in BATCH_SIZES
    )
    return max(comparisons, key=lambda c: (len(c.flips), c.max_change))


def compare_with_pinned(
    models: Sequence[OnnxModel], split: Split, images_sha256: str, path: Path = GOLDEN_FILES["bn"]
) -> tuple[PinnedOutputs, dict[str, Comparison]]:
    """Return a network's pinned outputs, and the worst comparison of each model by file name.

    Raises:
        UserError: The pinned outputs are missing, unreadable or about other images.
        CheckFailedError: A model does not run on the golden images.
    """
    pinned = read_pinned_outputs(path, split, images_sha256)
    return pinned, {model.path.name: worst_comparison(model, pinned, split) for model in models}


def pin_outputs(models: Sequence[OnnxModel], split: Split, images_sha256: str) -> PinnedOutputs:
    """Pin the outputs of a network's first model for all its models.

    Raises:
        CheckFailedError: A model does not agree with the first at every batch size.
    """
    first = models[0]
    pinned = PinnedOutputs(
        computed_by=f"ONNX Runtime {version('onnxruntime')} from {first.path.as_posix()}",
        weights_sha256=first.weights_sha256,
        onnx_sha256={model.path.name: model.sha256 for model in models},
        images_sha256=images_sha256,
        images=pinned_images(split, first.logits(network_input(split.images), len(split))),
    )
    for model in models:
        comparison = worst_comparison(model, pinned, split)
        if not comparison.same:
            raise CheckFailedError(
                f"nothing pinned: at batch size {comparison.batch_size} {model.path} differs from "
                f"{first.path} at batch size {len(split)} by {comparison.max_change:.2g} of the "
                f"row's largest logit (limit {TOLERANCE:g}); run `dvc repro verify`"
            )
    return pinned
