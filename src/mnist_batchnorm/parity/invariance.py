"""Check ``invariance``: an output depends on nothing but its input.

Not on the batch size, neighbors in the batch, order, optimization level or number of threads.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.parity.error_model import ALARM_SIGMAS
from mnist_batchnorm.parity.probes import round_figure
from mnist_batchnorm.parity.reference import Family, Reference
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.runtime import Level, Passes, RuntimeFailedError, WrongOutputError

# the first of each is the baseline
BATCH_SIZES = (1000, 1, 2, 7, 32, 10000)
LEVELS: tuple[Level, ...] = ("all", "disabled", "basic", "extended")
THREADS = (1, 2)

MIXED_BATCH_SIZE = 32  # of the passes with other neighbors
LIMIT_SIGMAS = 2 * ALARM_SIGMAS  # between two passes: each may lie `ALARM_SIGMAS` from float64
MAX_MULTIPLY_ADDS = 4e8  # of a pass: MNIST's test images through this project's network
BASELINE_FACTOR = 10  # times `MAX_MULTIPLY_ADDS` are allowed with baseline level and threads
MAX_THREADED_CALLS = 500  # of a pass with several threads, in which each call takes longer


@dataclass(frozen=True)
class Setting:
    """Settings of a pass over the natural inputs."""

    batch_size: int
    level: Level
    threads: int

    def rows(self, inputs: int, work: int) -> int:
        """Return the number of rows of a pass: whole batches, or 0 if it would take too long.

        Args:
            inputs: number of natural inputs; fewer than a batch are repeated.
            work: multiply-adds per input.
        """
        rows = min(inputs, int(MAX_MULTIPLY_ADDS // work))
        if self.threads > 1:
            rows = min(rows, MAX_THREADED_CALLS * self.batch_size)
        rows = max(rows // self.batch_size, 1) * self.batch_size
        baseline = (self.level, self.threads) == (LEVELS[0], THREADS[0])
        limit = MAX_MULTIPLY_ADDS * (BASELINE_FACTOR if baseline else 1)
        return rows if rows * work <= limit else 0


SETTINGS = [Setting(b, level, t) for t in THREADS for level in LEVELS for b in BATCH_SIZES]

# returns changed inputs, and for each row the index of its original input, -1 for none
Change = Callable[[Float32], tuple[npt.NDArray[np.intp], Float32]]


@dataclass(frozen=True)
class OutputPair:
    """Outputs that should be equal, float32 ``[rows, outputs]`` both.

    Attributes:
        place: the setting that ``got`` was computed with.
        rows: indices of the rows in a pass, ``[rows]``, in which inputs may repeat.
    """

    place: str
    got: Float32
    expected: Float32
    rows: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Difference:
    """The difference between pairs of outputs.

    Attributes:
        bit_equal: whether all are equal to the last bit; None without pairs.
        max_sigmas: largest difference, in standard deviations of rounding.
        beyond: places with a difference beyond `LIMIT_SIGMAS`.
    """

    bit_equal: bool | None
    max_sigmas: float
    beyond: list[str]

    @classmethod
    def of(cls, pairs: Iterable[OutputPair], family: Family) -> "Difference":
        """Compare pairs of outputs of a family."""
        equal: list[bool] = []
        apart: dict[str, float] = defaultdict(float)
        for pair in pairs:
            same = pair.got.view(np.uint32) == pair.expected.view(np.uint32)
            same |= np.isnan(pair.got) & np.isnan(pair.expected)
            equal.append(bool(same.all()))
            if equal[-1]:
                continue
            inputs = pair.rows % len(family.inputs)
            gap = finite(np.abs(pair.got.astype(np.float64) - pair.expected))
            sigmas = finite(gap / family.sigma[inputs])
            judged = family.judged[inputs] & ~same
            apart[pair.place] = max(apart[pair.place], round_figure(sigmas[judged].max(initial=0)))
        return cls(
            all(equal) if equal else None,
            max(apart.values(), default=0.0),
            [place for place, sigmas in apart.items() if sigmas > LIMIT_SIGMAS],
        )


@np.errstate(all="ignore")  # an overflow or a NaN is a finding
def check_invariance(passes: Passes, reference: Reference) -> Check:
    """Run natural inputs with every setting, and compare each input's outputs.

    They must be equal to the last bit or, because sums may run in another order, within
    `LIMIT_SIGMAS` standard deviations of rounding; the evidence says which. An empty batch must
    give an empty output or an error: ONNX Runtime cannot infer the -1 of a correct Reshape to
    [0, -1] then.
    """
    family = reference.natural
    done, failed = _run_grid(passes, reference)
    problems = _failures(done, failed)
    differences = {
        name: Difference.of(_varied(done, name), family)
        for name in ("batch_size", "level", "threads")
    }
    mixed = {
        s: got for s, got in done.items() if (s.batch_size, s.threads) == (MIXED_BATCH_SIZE, 1)
    }
    for name, change in {"order": _shuffled, "neighbours": _beside_nan}.items():
        pairs = _changed(passes, reference, mixed, change)
        try:
            differences[name] = Difference.of(pairs, family)
        except RuntimeFailedError as error:
            differences[name] = Difference.of([], family)
            problems.append(f"with other {name}: {error}")
    refused = False
    if done:
        try:
            refused = _refuses_empty_batch(passes, reference)
        except WrongOutputError as error:
            problems.append(f"an empty batch: {error}")
    problems += [
        f"results change with {_words([name])} ({', '.join(difference.beyond)}), by up to "
        f"{difference.max_sigmas:.3g} sigma of rounding where {LIMIT_SIGMAS} is honest"
        for name, difference in differences.items()
        if difference.beyond
    ]
    coupled = any(differences[name].beyond for name in ("batch_size", "order", "neighbours"))
    sizes = sorted({setting.batch_size for setting in done})
    evidence = {
        "limit": LIMIT_SIGMAS,
        "passes": len(done),
        "batch_sizes": sizes,
        "fails_at_batch_sizes": sorted({setting.batch_size for setting in failed}),
        "refuses_empty_batch": refused,
        "rows_coupled": coupled,
        "differences": {name: asdict(difference) for name, difference in differences.items()},
    }
    unequal = [name for name, difference in differences.items() if difference.bit_equal is False]
    if unequal and not problems and not reference.layers:
        detail = f"results change with {_words(unequal)}; nothing tells what is honest"
        return Check("invariance", "not judged", detail, evidence)
    how = "equal to the last bit"
    if unequal:
        most = max(difference.max_sigmas for difference in differences.values())
        how = f"within {most:.3g} of {LIMIT_SIGMAS} sigma, not bit-equal with {_words(unequal)}"
    return verdict(
        "invariance",
        problems,
        f"batch sizes {', '.join(map(str, sizes if refused else [0, *sizes]))}, 4 levels, 1 and 2 "
        f"threads, other order, NaN neighbours: {how}"
        + (" (an empty batch is refused)" if refused else ""),
        evidence,
    )


def _words(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def _run(passes: Passes, reference: Reference, setting: Setting, inputs: Float32) -> Float32:
    session = passes.session(setting.level, setting.threads)
    return reference.flatten(session.run_in_batches(inputs, setting.batch_size))


def _run_grid(
    passes: Passes, reference: Reference
) -> tuple[dict[Setting, Float32], dict[Setting, str]]:
    """Run the natural inputs with every setting; return outputs and error messages."""
    natural = reference.natural.inputs
    done, failed = {}, {}
    for setting in SETTINGS:
        if rows := setting.rows(len(natural), reference.work):
            try:
                done[setting] = _run(passes, reference, setting, _rows(natural, rows))
            except RuntimeFailedError as error:
                failed[setting] = str(error)
    return done, failed


def _rows(inputs: Float32, rows: int) -> Float32:
    """Return the first inputs, repeated if there are fewer than ``rows``."""
    return inputs[:rows] if rows <= len(inputs) else np.resize(inputs, (rows, *inputs.shape[1:]))


def _failures(done: Collection[Setting], failed: Mapping[Setting, str]) -> list[str]:
    if not failed:
        return []
    text = next(iter(failed.values()))
    if not done:
        return [text]
    sizes, works = (
        ", ".join(map(str, sorted({setting.batch_size for setting in settings})))
        for settings in (failed, done)
    )
    return [f"fails at batch size {sizes} in {len(failed)} passes, runs at {works}: {text}"]


def _varied(done: Mapping[Setting, Float32], name: str) -> Iterator[OutputPair]:
    """Pair passes that differ only in one setting with the first of them."""
    groups = defaultdict(list)
    for setting in done:
        groups[tuple((key, x) for key, x in vars(setting).items() if key != name)].append(setting)
    for first, *others in groups.values():
        for other in others:
            count = min(len(done[first]), len(done[other]))
            place = f"{getattr(other, name)} against {getattr(first, name)}"
            yield OutputPair(place, done[other][:count], done[first][:count], np.arange(count))


def _changed(
    passes: Passes, reference: Reference, done: Mapping[Setting, Float32], change: Change
) -> Iterator[OutputPair]:
    """Run changed inputs with settings that are done, and pair the outputs of each input."""
    count = min(map(len, done.values()), default=0)
    rows, inputs = change(_rows(reference.natural.inputs, count))
    kept = np.flatnonzero(rows >= 0)
    for setting, expected in done.items():
        got = _run(passes, reference, setting, inputs)
        yield OutputPair(f"level {setting.level}", got[kept], expected[rows[kept]], rows[kept])


def _shuffled(inputs: Float32) -> tuple[npt.NDArray[np.intp], Float32]:
    """Return the order and the reordered inputs."""
    order = np.random.default_rng(0).permutation(len(inputs))
    return order, inputs[order]


def _beside_nan(inputs: Float32) -> tuple[npt.NDArray[np.intp], Float32]:
    """Return the indices, -1 for NaN inputs, and the inputs with every second one NaN."""
    changed = inputs.copy()
    changed[1::2] = np.nan
    rows = np.arange(len(inputs))
    rows[1::2] = -1
    return rows, changed


def _refuses_empty_batch(passes: Passes, reference: Reference) -> bool:
    """Whether the file fails on an empty batch; a WrongOutputError if its output is not empty."""
    try:
        for level in LEVELS:
            reference.flatten(passes.session(level).run(reference.natural.inputs[:0]))
    except WrongOutputError:
        raise
    except RuntimeFailedError:
        return True
    return False
