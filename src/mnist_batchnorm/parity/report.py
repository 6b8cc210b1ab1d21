"""What a check says: a verdict, one sentence for people, and the numbers behind it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: of the check: ``structure``, ``weights``, ``outputs`` …
        passed: whether what it checks holds.
        detail: one sentence: what holds, or what differs, where and by how much.
        evidence: JSON-serializable numbers, worst case first.
    """

    name: str
    passed: bool
    detail: str
    evidence: dict[str, Any] = field(default_factory=dict)


LARGEST = 1e300  # stands for NaN and infinity, which JSON does not know
SHOWN = 3  # problems in the sentence; all of them are in the evidence


def verdict(name: str, problems: list[str], success: str, evidence: dict[str, Any]) -> Check:
    """Make a check that passes when there are no problems, and otherwise tells the first ones."""
    if not problems:
        return Check(name, True, success, evidence)
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    detail = "; ".join([*problems[:SHOWN], *more])
    return Check(name, False, detail, evidence | {"problems": problems})


def finite(errors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return errors with NaN, infinity and what is larger replaced by `LARGEST`."""
    return np.fmin(errors, LARGEST)


def one_line(error: Exception) -> str:
    """Return the start of an exception's message without its line breaks."""
    return " ".join(str(error).split())[:300]
