"""TODO."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.reading import Floats
from mnist_batchnorm.reporting import plots
from mnist_batchnorm.reporting.results import Results

SHOWN_MISTAKES = 12

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson_interval(successes: npt.ArrayLike, trials: npt.ArrayLike) -> Floats:
    """Return 95 % intervals of proportions, low and high, float64 ``[2, ...]``.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference": unlike
    the textbook interval it holds near 0 and 1, where these accuracies are.
    """
    trials = np.asarray(trials, dtype=np.float64)
    share = np.asarray(successes) / trials
    centre = share + Z95**2 / (2 * trials)
    spread = Z95 * np.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    ends: Floats = np.stack([centre - spread, centre + spread]) / (1 + Z95**2 / trials)
    return ends


@dataclass(frozen=True)
class PairedDifference:
    """Batch norm against plain, on the same test images.

    Attributes:
        difference: accuracy of batch norm minus accuracy of plain.
        low: lower end of the difference's 95 % interval.
        high: upper end.
        only_bn: images that only batch norm gets right.
        only_plain: images that only plain gets right.
    """

    difference: float
    low: float
    high: float
    only_bn: int
    only_plain: int


def paired_difference(bn: npt.NDArray[np.bool_], plain: npt.NDArray[np.bool_]) -> PairedDifference:
    """Compare two networks image by image.

    The interval is Wald's for paired proportions (Agresti, "Categorical Data Analysis",
    section on comparing dependent proportions): only the discordant images carry variance.

    Args:
        bn: ``[n]``, whether batch norm is right.
        plain: ``[n]``, whether plain is right.
    """
    n, only_bn, only_plain = len(bn), int((bn & ~plain).sum()), int((plain & ~bn).sum())
    difference = (only_bn - only_plain) / n
    error = math.sqrt(only_bn + only_plain - (only_bn - only_plain) ** 2 / n) / n
    return PairedDifference(
        difference, difference - Z95 * error, difference + Z95 * error, only_bn, only_plain
    )


def reliability(
    probability: Floats, correct: npt.NDArray[np.bool_], bins: int
) -> plots.Reliability:
    """Group images by confidence, in the calibration error's bins, leaving out empty ones.

    Args:
        probability: ``[n]``, of the predicted class.
        correct: ``[n]``, whether the prediction was right.
        bins: number of equal-width bins between 0 and 1; a bin includes its upper edge.
    """
    which = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(which, minlength=bins)
    right = np.bincount(which, weights=correct, minlength=bins)
    confidence = np.bincount(which, weights=probability, minlength=bins)
    held = images > 0
    counts = images[held]
    return plots.Reliability(
        confidence=confidence[held] / counts,
        accuracy=right[held] / counts,
        interval=wilson_interval(right[held], counts),
        images=counts,
    )


def off_diagonal(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a confusion matrix with the right answers set to zero."""
    return matrix * (1 - np.eye(len(matrix), dtype=np.int64))


def most_confused(results: Results) -> int:
    """Return the largest count of one kind of error, the scale that both matrices share."""
    return max(int(off_diagonal(n.confusion).max()) for n in results.networks.values())


@dataclass(frozen=True)
class Mistake:
    """A test image that batch norm gets wrong.

    Attributes:
        picture: PNG as a data URI, ink on paper.
        index: position in the IDX file.
        actual: the image's class.
        predicted: batch norm's answer.
        probability: batch norm's confidence in it.
        plain: the plain network's answer.
    """

    picture: str
    index: int
    actual: int
    predicted: int
    probability: float
    plain: int


def confident_mistakes(results: Results) -> list[Mistake]:
    """Return batch norm's most confident errors, the most confident first."""
    test, bn = results.test, results.networks["bn"]
    wrong = np.flatnonzero(bn.predicted != test.labels)
    worst = wrong[np.argsort(-bn.probability[wrong], kind="stable")][:SHOWN_MISTAKES]
    return [
        Mistake(
            picture=plots.png_uri(test.images[i]),
            index=int(test.index[i]),
            actual=int(test.labels[i]),
            predicted=int(bn.predicted[i]),
            probability=float(bn.probability[i]),
            plain=int(results.networks["plain"].predicted[i]),
        )
        for i in worst
    ]
