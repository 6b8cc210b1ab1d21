"""Does ONNX Runtime compute what the network means, up to rounding, on inputs of every kind?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.parity.bounds import ALARM
from mnist_batchnorm.parity.reference import REAL, Family, Float64, Reference
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.runtime import LEVELS, Float32, Level, Passes, RuntimeFailedError

BIN, BINS = 0.5, 17  # of the histogram: standard deviations, up to ALARM and one beyond


class Failures:
    """What goes wrong in several passes, each thing said once, with where."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, text: str, place: str) -> None:
        """Note what goes wrong at a place."""
        self._places.setdefault(text, []).append(place)

    def texts(self, everywhere: int) -> list[str]:
        """Return a text for each thing; where it goes wrong at so many places, without them."""
        return [
            text if len(places) == everywhere else f"{', '.join(places)}: {text}"
            for text, places in self._places.items()
        ]


@dataclass(frozen=True)
class Worst:
    """Where a family's outputs lie furthest from float64, in standard deviations of rounding.

    Attributes:
        sigmas: how far; NaN and infinity count as `LARGEST`.
        level: of optimization.
        row: of the family's inputs.
        output: of that row, flattened.
        got: the file's; None for NaN and infinity.
        expected: what it should be.
        rows_beyond: rows with an output beyond `ALARM`.
        share_of_bound: largest error of all over its worst-case bound; no rounding exceeds 1.
        relative_error: largest error of all over its row's largest output.
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
    def of(cls, family: Family, got: Float32, level: Level) -> "Worst":
        """Find it in a file's outputs, float32 ``[n, outputs]``."""
        sigmas, errors = family.sigmas(got), family.errors(got)
        row, output = (int(i) for i in np.unravel_index(sigmas.argmax(), sigmas.shape))
        return cls(
            short(sigmas[row, output]),
            level,
            row,
            output,
            _float32(got[row, output]),
            _float32(family.exact[row, output]),
            int((sigmas > ALARM).any(axis=1).sum()),
            short(finite(errors / family.bound)[family.judged].max(initial=0)),
            short(finite(errors.max(axis=1) / family.size).max()),
        )


def short(number: float) -> float:
    """Round to the digits that a reader of a report needs."""
    return float(f"{number:.4g}")


def _float32(number: float) -> float | None:
    return float(f"{number:.9g}") if np.isfinite(number) else None


def outputs(passes: Passes, reference: Reference, family: Family, level: Level) -> Float32:
    """Run a family at an optimization level, float32 ``[n, outputs]``.

    Raises:
        RuntimeFailedError: The file does not run, or gives something else than the network does.
    """
    return reference.rows(passes.run(family.name, family.inputs, level))


def relative_errors(passes: Passes, reference: Reference) -> Float64 | None:
    """Return each real input's largest error over its largest exact output, ``[n]``.

    Of all optimization levels; None without real inputs, or where the file does not run.
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

    An error beyond `ALARM` standard deviations of rounding fails. So does a unit that could be
    probed on a side where no probe has been, and a network that leaves float32's range on natural
    inputs: there nothing was compared.

    Args:
        passes: of the file.
        reference: what it should compute.
    """
    failures = Failures()
    found: dict[str, list[Worst]] = {name: [] for name in reference.families}
    natural = reference.natural
    sigmas = np.zeros(len(natural.inputs))
    for level in LEVELS:
        try:
            for name, family in reference.families.items():
                got = outputs(passes, reference, family, level)
                found[name].append(Worst.of(family, got, level))
                if family is natural:
                    sigmas = np.maximum(sigmas, family.sigmas(got).max(axis=1))
            for text in _broken_problems(passes, reference, level):
                failures.add(text, f"level {level}")
        except RuntimeFailedError as error:
            failures.add(str(error), f"level {level}")
    worst = {name: max(w, key=lambda w: w.sigmas) for name, w in found.items() if w}
    problems = failures.texts(len(LEVELS))
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
            f"{count:,} inputs of {len(worst)} kinds: at most {largest} of {ALARM} sigma of "
            f"rounding from float64; median tolerance {tolerance:.2g} of the largest output; no "
            f"rounding can change the class of {certified:,} of {len(natural.inputs):,} "
            f"{natural.name} inputs"
        )
    return verdict(
        "probes",
        problems,
        success,
        {
            "alarm": ALARM,
            "max_sigmas": largest,
            "median_tolerance": tolerance,
            "natural": natural.name,
            "certified": certified,
            "histogram": {"bin": BIN, "counts": _histogram(sigmas)}
            if natural.name in worst
            else None,
            "units": reference.units,
            "unexercised": [str(side) for side in reference.unexercised],
            "out_of_reach": [str(side) for side in reference.out_of_reach],
        }
        | evidence,
    )


def _broken_problems(passes: Passes, reference: Reference, level: Level) -> Iterator[str]:
    """Compare where outputs are NaN or infinite with PyTorch."""
    for name, (inputs, pytorch) in reference.broken.items():
        got = reference.rows(passes.run(name, inputs, level))
        differ = (_kind(got) != _kind(pytorch)).any(axis=1)
        if differ.any():
            yield (
                f"inputs with {name}: {differ.sum()} of {len(inputs)} give NaN or infinity "
                "elsewhere than PyTorch"
            )


def _kind(outputs: Float32) -> npt.NDArray[np.float32]:
    """Map NaN and infinities to themselves, all numbers to 0, NaN so that it equals itself."""
    return np.where(np.isnan(outputs), np.float32(2), np.isinf(outputs) * np.sign(outputs))


def _problem(family: Family, worst: Worst) -> str:
    got = "not finite" if worst.got is None else f"{worst.got} ({worst.sigmas:.3g} sigma off)"
    return (
        f"{family.name} inputs: {worst.rows_beyond:,} of {len(family.inputs):,} beyond {ALARM} "
        f"sigma of rounding, most input {worst.row}, output {worst.output}: {got}, float64 gives "
        f"{worst.expected} (level {worst.level})"
    )


def _evidence(family: Family, worst: Worst | None) -> dict[str, Any]:
    tolerance = (ALARM * family.sigma).max(axis=1) / family.size
    judged = family.judged.all(axis=1)
    return {
        "inputs": len(family.inputs),
        "judged": int(judged.sum()),
        "median_tolerance": short(np.median(tolerance[judged])) if judged.any() else None,
        "pytorch_sigmas": short(family.sigmas(family.pytorch).max()),
        **(asdict(worst) if worst is not None else {}),
    }


def _weaknesses(reference: Reference) -> Iterator[str]:
    """Say what the probes could not show, whatever the file does."""
    natural = reference.natural
    lost = np.flatnonzero(~natural.judged.all(axis=1))
    if lost.size:
        yield (
            f"probes too weak: the network itself leaves float32's range on {lost.size:,} of "
            f"{len(natural.inputs):,} {natural.name} inputs, first input {lost[0]}"
        )
    if reference.unexercised:
        sides = [str(side) for side in reference.unexercised]
        more = f" and {len(sides) - 5} more" if len(sides) > 5 else ""
        yield f"probes too weak: no input was found for {', '.join(sides[:5])}{more}"


def _certified(family: Family) -> int:
    """Count the inputs whose class no rounding can change.

    The best output at its lowest, by the worst-case bound, lies above all others at their highest.
    """
    rows, best = np.arange(len(family.exact)), family.exact.argmax(axis=1)
    lowest = (family.exact - family.bound)[rows, best]
    others = family.exact + family.bound
    others[rows, best] = -np.inf
    return int((lowest > others.max(axis=1)).sum())


def _histogram(sigmas: Float64) -> list[int]:
    """Count inputs by their largest error, in bins of `BIN` to `ALARM` and one for all beyond."""
    bins = np.ceil(np.minimum(sigmas, ALARM + BIN) / BIN).astype(int)  # ends belong to the lower
    counts: list[int] = np.bincount(np.maximum(bins - 1, 0), minlength=BINS).tolist()
    return counts
