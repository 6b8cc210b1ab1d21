"""Numbers of the report: intervals, paired difference, reliability, confident mistakes."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.core.arrays import Float64, calibration_bins
from mnist_batchnorm.reporting.results import Results

MAX_MISTAKES = 12

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson_interval(successes: npt.ArrayLike, trials: npt.ArrayLike) -> Float64:
    """Return 95 % intervals of proportions, low and high, float64 ``[2, ...]``.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927: unlike
    the textbook interval it is accurate near 0 and 1, where these accuracies are.
    """
    trials = np.asarray(trials, dtype=np.float64)
    share = np.asarray(successes) / trials
    center = share + Z95**2 / (2 * trials)
    spread = Z95 * np.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    ends: Float64 = np.stack([center - spread, center + spread]) / (1 + Z95**2 / trials)
    return ends


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of batch norm minus that of plain, with the ends of its 95 % interval."""

    difference: float
    low: float
    high: float
    only_bn: int  # number of images that only batch norm gets right
    only_plain: int


def paired_difference(bn: npt.NDArray[np.bool_], plain: npt.NDArray[np.bool_]) -> PairedDifference:
    """Compare the networks' right answers, ``[n]`` each, image by image.

    The interval is Wald's for paired proportions (Agresti, "Categorical Data Analysis",
    section on comparing dependent proportions).
    """
    n, only_bn, only_plain = len(bn), int((bn & ~plain).sum()), int((plain & ~bn).sum())
    difference = (only_bn - only_plain) / n
    error = math.sqrt(only_bn + only_plain - (only_bn - only_plain) ** 2 / n) / n
    return PairedDifference(
        difference, difference - Z95 * error, difference + Z95 * error, only_bn, only_plain
    )


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, one value per bin that contains images."""

    confidence: Float64  # mean probability of the predicted class
    accuracy: Float64  # share of right predictions
    interval: Float64  # [2, bins], low and high end of the accuracy's 95 % interval
    images: npt.NDArray[np.int64]  # number of images


def reliability(probability: Float64, correct: npt.NDArray[np.bool_], bins: int) -> Reliability:
    """Group images by confidence, in the bins of `calibration_bins`, leaving out empty ones."""
    bin_of = calibration_bins(probability, bins)
    images = np.bincount(bin_of)
    right = np.bincount(bin_of, weights=correct)
    confidence = np.bincount(bin_of, weights=probability)
    held = images > 0
    counts = images[held]
    return Reliability(
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
    """A test image that batch norm gets wrong."""

    image: npt.NDArray[np.uint8]  # [28, 28]
    index: int  # position in the IDX file
    actual: int
    predicted: int
    probability: float  # batch norm's confidence in its prediction
    plain: int  # the plain network's prediction


def confident_mistakes(results: Results) -> list[Mistake]:
    """Return batch norm's most confident errors, the most confident first."""
    test, bn = results.test, results.networks["bn"]
    wrong = np.flatnonzero(~results.right("bn"))
    worst = wrong[np.argsort(-bn.probability[wrong], kind="stable")][:MAX_MISTAKES]
    plain = results.networks["plain"].predicted
    columns = (test.index, test.labels, bn.predicted, bn.probability, plain)
    rows = zip(*(column[worst].tolist() for column in columns), strict=True)
    return [Mistake(image, *row) for image, row in zip(test.images[worst], rows, strict=True)]
