"""Check ``probes``: ONNX Runtime gives the exact outputs up to rounding, on all kinds of inputs."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.core.arrays import Float32, Float64
from mnist_batchnorm.parity.error_model import ALARM_SIGMAS
from mnist_batchnorm.parity.reference import REAL, Family, Reference
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.runtime import LEVELS, Level, Passes, RuntimeFailedError

HISTOGRAM_BIN = 0.5  # standard deviations
HISTOGRAM_BINS = 17  # up to ALARM_SIGMAS, and one beyond


@dataclass(frozen=True)
class WorstError:
    """The output of a family with the largest error, in standard deviations of rounding.

    Attributes:
        sigmas: error; `LARGEST_ERROR` for NaN and infinity.
        level: optimization level.
        row: index of the input in the family.
        output: index of the output in the flattened row.
        got: the file's output; None for NaN and infinity.
        expected: exact output.
        rows_beyond: number of rows with an error beyond `ALARM_SIGMAS`.
        share_of_bound: largest error relative to its worst-case bound; rounding stays below 1.
        relative_error: largest error relative to its row's largest output.
    """

    sigmas: float
    level: Level
    row: int
    output: int
    got: float | None
    expected: float | None
    rows_beyond: int
    share_of_bound: float
    relative_error: float

    @classmethod
    def of(cls, family: Family, got: Float32, level: Level) -> "WorstError":
        """Find the worst error in a file's outputs, float32 ``[n, outputs]``."""
        sigmas, errors = family.sigmas(got), family.errors(got)
        row, output = (int(i) for i in np.unravel_index(sigmas.argmax(), sigmas.shape))
        return cls(
            round_figure(sigmas[row, output]),
            level,
            row,
            output,
            _float32(got[row, output]),
            _float32(family.exact[row, output]),
            int((sigmas > ALARM_SIGMAS).any(axis=1).sum()),
            round_figure(finite(errors / family.bound)[family.judged].max(initial=0)),
            round_figure(finite(errors.max(axis=1) / family.size).max()),
        )


def round_figure(number: float) -> float:
    """Round to four significant digits."""
    return float(f"{number:.4g}")


def _float32(number: float) -> float | None:
    return float(f"{number:.9g}") if np.isfinite(number) else None


def outputs(passes: Passes, reference: Reference, family: Family, level: Level) -> Float32:
    """Run a family at an optimization level, float32 ``[n, outputs]``.

    Raises:
        RuntimeFailedError: The file does not run, or its output has another type or shape.
    """
    return reference.flatten(passes.run(family.name, family.inputs, level))


def relative_errors(passes: Passes, reference: Reference) -> Float64 | None:
    """Return each real input's largest error of all levels over its largest output, ``[n]``.

    None without real inputs, or if the file does not run.
    """
    if REAL not in reference.families:
        return None
    family = reference.families[REAL]
    try:
        errors = [family.errors(outputs(passes, reference, family, level)) for level in LEVELS]
    except RuntimeFailedError:
        return None
    return finite(np.max(errors, axis=(0, 2)) / family.size)


@np.errstate(all="ignore")  # an overflow or a NaN is a finding
def check_probes(passes: Passes, reference: Reference) -> Check:
    """Run every probe at every optimization level; compare with float64, and NaN with PyTorch.

    An error beyond `ALARM_SIGMAS` standard deviations of rounding fails. So does a side of a unit
    that some input, but no probe, can enter, and a network that leaves float32's range on natural
    inputs, where nothing can be compared.
    """
    failures: dict[str, list[str]] = defaultdict(list)  # text -> levels
    found: dict[str, list[WorstError]] = {name: [] for name in reference.families}
    natural = reference.natural
    sigmas = np.zeros(len(natural.inputs))
    for level in LEVELS:
        try:
            for name, family in reference.families.items():
                got = outputs(passes, reference, family, level)
                found[name].append(WorstError.of(family, got, level))
                if family is natural:
                    sigmas = np.maximum(sigmas, family.sigmas(got).max(axis=1))
            for text in _broken_problems(passes, reference, level):
                failures[text].append(f"level {level}")
        except RuntimeFailedError as error:
            failures[str(error)].append(f"level {level}")
    worst = {name: max(w, key=lambda w: w.sigmas) for name, w in found.items() if w}
    problems = [
        text if len(levels) == len(LEVELS) else f"{', '.join(levels)}: {text}"
        for text, levels in failures.items()
    ]
    problems += [
        _problem(reference.families[name], w) for name, w in worst.items() if w.rows_beyond
    ]
    evidence: dict[str, Any] = {
        "families": {
            name: _evidence(family, worst.get(name)) for name, family in reference.families.items()
        },
        "not_finite": {name: len(inputs) for name, (inputs, _) in reference.broken.items()},
    }
    if not reference.layers:
        if problems:
            return verdict("probes", problems, "", evidence)
        off = max(w.relative_error for w in worst.values())
        detail = f"errors up to {off:.2g} of a row's largest output; nothing tells what is honest"
        return Check("probes", "not judged", detail, evidence)

    problems += _weaknesses(reference)
    certified = _certified(natural)
    largest = max((w.sigmas for w in worst.values()), default=None)
    tolerance = evidence["families"][natural.name]["median_tolerance"]
    success = ""
    if not problems:
        count = sum(len(family.inputs) for family in reference.families.values())
        success = (
            f"{count:,} inputs of {len(worst)} kinds: at most {largest} of {ALARM_SIGMAS} sigma of "
            f"rounding from float64; median tolerance {tolerance:.2g} of the largest output; no "
            f"rounding can change the class of {certified:,} of {len(natural.inputs):,} "
            f"{natural.name} inputs"
        )
    return verdict(
        "probes",
        problems,
        success,
        {
            "alarm": ALARM_SIGMAS,
            "max_sigmas": largest,
            "median_tolerance": tolerance,
            "natural": natural.name,
            "certified": certified,
            "histogram": {"bin": HISTOGRAM_BIN, "counts": _histogram(sigmas)}
            if natural.name in worst
            else None,
            "units": reference.units,
            "unexercised": [str(side) for side in reference.uncovered_sides],
            "out_of_reach": [str(side) for side in reference.unreachable_sides],
        }
        | evidence,
    )


def _broken_problems(passes: Passes, reference: Reference, level: Level) -> Iterator[str]:
    """Compare with PyTorch which outputs are NaN or infinite."""
    for name, (inputs, pytorch) in reference.broken.items():
        got = reference.flatten(passes.run(name, inputs, level))
        differ = (_kind(got) != _kind(pytorch)).any(axis=1)
        if differ.any():
            yield (
                f"inputs with {name}: {differ.sum()} of {len(inputs)} give NaN or infinity "
                "elsewhere than PyTorch"
            )


def _kind(outputs: Float32) -> npt.NDArray[np.float32]:
    """Map finite numbers to 0, infinities to their sign and NaN to 2."""
    return np.where(np.isnan(outputs), np.float32(2), np.isinf(outputs) * np.sign(outputs))


def _problem(family: Family, worst: WorstError) -> str:
    got = "not finite" if worst.got is None else f"{worst.got} ({worst.sigmas:.3g} sigma off)"
    return (
        f"{family.name} inputs: {worst.rows_beyond:,} of {len(family.inputs):,} beyond "
        f"{ALARM_SIGMAS} sigma of rounding, most input {worst.row}, output {worst.output}: {got}, "
        f"float64 gives {worst.expected} (level {worst.level})"
    )


def _evidence(family: Family, worst: WorstError | None) -> dict[str, Any]:
    tolerance = (ALARM_SIGMAS * family.sigma).max(axis=1) / family.size
    judged = family.judged.all(axis=1)
    return {
        "inputs": len(family.inputs),
        "judged": int(judged.sum()),
        "median_tolerance": round_figure(np.median(tolerance[judged])) if judged.any() else None,
        "pytorch_sigmas": round_figure(family.sigmas(family.pytorch).max()),
        **(asdict(worst) if worst is not None else {}),
    }


def _weaknesses(reference: Reference) -> Iterator[str]:
    """Yield what the probes cannot show, independent of the file."""
    natural = reference.natural
    lost = np.flatnonzero(~natural.judged.all(axis=1))
    if lost.size:
        yield (
            f"probes too weak: the network itself leaves float32's range on {lost.size:,} of "
            f"{len(natural.inputs):,} {natural.name} inputs, first input {lost[0]}"
        )
    if reference.uncovered_sides:
        sides = [str(side) for side in reference.uncovered_sides]
        more = f" and {len(sides) - 5} more" if len(sides) > 5 else ""
        yield f"probes too weak: no input was found for {', '.join(sides[:5])}{more}"


def _certified(family: Family) -> int:
    """Count the inputs whose class no rounding can change, by the worst-case bound."""
    rows, best = np.arange(len(family.exact)), family.exact.argmax(axis=1)
    lowest = (family.exact - family.bound)[rows, best]
    others = family.exact + family.bound
    others[rows, best] = -np.inf
    return int((lowest > others.max(axis=1)).sum())


def _histogram(sigmas: Float64) -> list[int]:
    """Count inputs by their largest error, in `HISTOGRAM_BINS`."""
    capped = np.minimum(sigmas, ALARM_SIGMAS + HISTOGRAM_BIN)
    bins = np.ceil(capped / HISTOGRAM_BIN).astype(int)  # an edge belongs to the lower bin
    counts: list[int] = np.bincount(np.maximum(bins - 1, 0), minlength=HISTOGRAM_BINS).tolist()
    return counts
