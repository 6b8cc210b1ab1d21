"""Array types, and small functions of arrays that several packages share."""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def relative_change(expected: Float32 | Float64, actual: Float32 | Float64) -> Float64:
    """Return each row's largest absolute change, relative to its largest absolute value, ``[n]``.

    Not each element's own relative change: near zero any honest runtime changes that by much.
    """
    exact = expected.astype(np.float64)
    scale = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny)
    change: Float64 = np.abs(actual - exact).max(axis=1) / scale
    return change


def calibration_bins(probability: Float64, bins: int) -> npt.NDArray[np.int64]:
    """Return each probability's bin among equal-width ones; a bin includes its upper edge."""
    return np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
