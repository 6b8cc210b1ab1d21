"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mnist_batchnorm.artifacts.goldens import GOLDENS, Goldens, golden_images, load_goldens
from mnist_batchnorm.artifacts.splits import Split, network_input
from mnist_batchnorm.core.arrays import Float32, Float64
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.promotion.graph import Graph

BATCH_SIZES = (64, 32, 7, 2, 1)  # images a call

# Largest change of a logit over the row's largest logit that is still rounding: honest graphs were
# measured within 1.6e-6 of float64 arithmetic on the fixture's images, the plain network the
# furthest, so two of them lie within 3.2e-6 of each other.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class changed.

    Attributes:
        index: position in MNIST's test file.
        label: the digit that it is.
        before: class that the goldens predict.
        after: class that the graph predicts.
        margin_before: the golden largest logit minus the second largest.
        margin_after: the same of the graph's.
    """

    index: int
    label: int
    before: int
    after: int
    margin_before: float
    margin_after: float


@dataclass(frozen=True)
class Comparison:
    """How logits differ from the golden ones; changes are relative to the row's largest logit.

    Attributes:
        batch_size: at which the logits were computed.
        max_change: over all images.
        median_change: over all images.
        images_beyond: images that changed by more than `TOLERANCE`.
        right_before: images that the goldens classify rightly.
        right_after: images that the graph classifies rightly.
        flips: images whose predicted class changed.
    """

    batch_size: int
    max_change: float
    median_change: float
    images_beyond: int
    right_before: int
    right_after: int
    flips: tuple[Flip, ...]

    @property
    def same(self) -> bool:
        """Whether only rounding tells the two apart."""
        return not self.images_beyond and not self.flips


def relative_change(golden: Float32, logits: Float32) -> Float64:
    """Return each row's largest change over the row's largest golden logit, ``[n]``.

    Not each logit's own relative change: near zero that is large for any honest runtime.
    """
    exact = golden.astype(np.float64)
    size = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny)
    change: Float64 = np.abs(logits - exact).max(axis=1) / size
    return change


def margins(logits: Float32) -> Float64:
    """Return how far the largest logit of each row is above the second, ``[n]``."""
    second, first = np.sort(logits.astype(np.float64), axis=1)[:, -2:].T
    difference: Float64 = first - second
    return difference


def compare(golden: Float32, logits: Float32, split: Split, batch_size: int) -> Comparison:
    """Compare a graph's logits of the fixture with the golden ones.

    Args:
        golden: float32 ``[n, 10]``.
        logits: float32 ``[n, 10]``, finite.
        split: the n images.
        batch_size: at which ``logits`` were computed.
    """
    change = relative_change(golden, logits)
    before, after = golden.argmax(axis=1), logits.argmax(axis=1)
    margin_before, margin_after = margins(golden), margins(logits)
    return Comparison(
        batch_size=batch_size,
        max_change=float(change.max()),
        median_change=float(np.median(change)),
        images_beyond=int((change > TOLERANCE).sum()),
        right_before=int((before == split.labels).sum()),
        right_after=int((after == split.labels).sum()),
        flips=tuple(
            Flip(
                int(split.index[i]),
                int(split.labels[i]),
                int(before[i]),
                int(after[i]),
                float(margin_before[i]),
                float(margin_after[i]),
            )
            for i in np.flatnonzero(before != after)
        ),
    )


def regress(graph: Graph, goldens: Goldens, split: Split) -> Comparison:
    """Run a graph on the fixture at every batch size and return the worst comparison.

    Raises:
        CheckFailedError: The graph cannot run on the fixture.
    """
    inputs = network_input(split.images)
    golden = goldens.logits
    comparisons = [
        compare(golden, graph.logits(inputs, batch_size), split, batch_size)
        for batch_size in BATCH_SIZES
    ]
    return max(comparisons, key=lambda c: (len(c.flips), c.max_change))


def compare_with_goldens(
    graphs: Sequence[Graph], split: Split, images_sha256: str, path: Path = GOLDENS
) -> tuple[Goldens, dict[str, Comparison]]:
    """Compare each graph of one network with the goldens that are pinned in a file.

    Returns:
        The goldens, and the worst comparison of each graph by its file's name.

    Raises:
        UserError: The goldens are missing, unreadable or of other images.
        CheckFailedError: A graph cannot run on the fixture.
    """
    goldens = load_goldens(path, split, images_sha256)
    return goldens, {graph.path.name: regress(graph, goldens, split) for graph in graphs}


def pin(graphs: Sequence[Graph], split: Split, images_sha256: str) -> Goldens:
    """Make the outputs of the first graph of a network the goldens of all.

    Raises:
        CheckFailedError: A graph does not agree with the first at every batch size.
    """
    first = graphs[0]
    goldens = Goldens(
        computed_by=f"ONNX Runtime {version('onnxruntime')} from {first.path.as_posix()}",
        weights_sha256=first.weights_sha256,
        onnx_sha256={graph.path.name: graph.sha256 for graph in graphs},
        images_sha256=images_sha256,
        images=golden_images(split, first.logits(network_input(split.images), len(split))),
    )
    for graph in graphs:
        comparison = regress(graph, goldens, split)
        if not comparison.same:
            raise CheckFailedError(
                f"nothing pinned: at batch size {comparison.batch_size} {graph.path} differs from "
                f"{first.path} at batch size {len(split)} by {comparison.max_change:.2g} of the "
                f"row's largest logit (limit {TOLERANCE:g}); run `dvc repro verify`"
            )
    return goldens
