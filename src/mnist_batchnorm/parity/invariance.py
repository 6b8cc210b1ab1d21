"""Does an input's result depend on anything else: batch size, neighbours, level, threads?"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.parity.bounds import ALARM
from mnist_batchnorm.parity.probes import short
from mnist_batchnorm.parity.reference import Family, Reference
from mnist_batchnorm.parity.report import Check, finite, verdict
from mnist_batchnorm.parity.runtime import (
    Float32,
    Level,
    Passes,
    RuntimeFailedError,
    WrongOutputError,
)

# of each the first is what the others are compared with
BATCH_SIZES = (1000, 1, 2, 7, 32, 10000)
LEVELS: tuple[Level, ...] = ("all", "disabled", "basic", "extended")
THREADS = (1, 2)

MIXED = 32  # batch size at which an input gets other neighbours
LIMIT = 2 * ALARM  # sigma between two passes, as each may lie `ALARM` from float64
WORK = 4e8  # multiply-adds of a pass: MNIST's test images through this project's network
ONCE = 10  # times so much may a batch size take, in its first setting, that needs it
CALLS = 500  # of a pass with several threads, where each takes longer


@dataclass(frozen=True)
class Setting:
    """How a pass over the natural inputs is made.

    Attributes:
        batch_size: inputs a call.
        level: of optimization.
        threads: that share the work of an operator.
    """

    batch_size: int
    level: Level
    threads: int

    def rows(self, inputs: int, work: int) -> int:
        """Return how many rows a pass has: whole batches, inputs repeated where they are few.

        Args:
            inputs: that there are.
            work: multiply-adds for one.

        Returns:
            0 when it would take too long.
        """
        rows = min(inputs, int(WORK // work))
        if self.threads > 1:
            rows = min(rows, CALLS * self.batch_size)
        rows = max(rows // self.batch_size, 1) * self.batch_size
        first = (self.level, self.threads) == (LEVELS[0], THREADS[0])
        return rows if rows * work <= WORK * (ONCE if first else 1) else 0


SETTINGS = [Setting(b, level, t) for t in THREADS for level in LEVELS for b in BATCH_SIZES]


# of inputs: others in their place, and which of them each row is, -1 for none
Change = Callable[[Float32], tuple[npt.NDArray[np.intp], Float32]]


@dataclass(frozen=True)
class Pair:
    """Outputs that should be equal, float32 ``[rows, outputs]`` both.

    Attributes:
        place: where those that were ``got`` were made.
        rows: which of a pass's rows they are, ``[rows]``; the inputs may be fewer and repeat.
    """

    place: str
    got: Float32
    expected: Float32
    rows: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Difference:
    """How far pairs of outputs lie apart.

    Attributes:
        bit_equal: whether they are equal to the last bit; None when there were none.
        max_sigmas: how far at most, in standard deviations of rounding.
        beyond: the places where that is more than `LIMIT`.
    """

    bit_equal: bool | None
    max_sigmas: float
    beyond: list[str]

    @classmethod
    def of(cls, pairs: Iterable[Pair], family: Family) -> "Difference":
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
            apart[pair.place] = max(apart[pair.place], short(sigmas[judged].max(initial=0)))
        return cls(
            all(equal) if equal else None,
            max(apart.values(), default=0.0),
            [place for place, sigmas in apart.items() if sigmas > LIMIT],
        )


@np.errstate(all="ignore")  # an overflow or a NaN is a finding
def check_invariance(passes: Passes, reference: Reference) -> Check:
    """Run natural inputs in every way, and compare what each input gives.

    Outputs must be equal to the last bit or, where sums run in another order, lie within `LIMIT`
    standard deviations of rounding; the evidence says which. A file that fails at a batch size
    fails. An empty batch must give an empty output, or be refused: ONNX Runtime cannot infer the -1
    of an honest Reshape to [0, -1] then.

    Args:
        passes: of the file.
        reference: what it should compute.
    """
    family = reference.natural
    done, failed = _run_grid(passes, reference)
    problems = _failures(done, failed)
    differences = {
        name: Difference.of(_varied(done, name), family)
        for name in ("batch_size", "level", "threads")
    }
    mixed = {s: got for s, got in done.items() if (s.batch_size, s.threads) == (MIXED, 1)}
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
        f"{difference.max_sigmas:.3g} sigma of rounding where {LIMIT} is honest"
        for name, difference in differences.items()
        if difference.beyond
    ]
    coupled = any(differences[name].beyond for name in ("batch_size", "order", "neighbours"))
    sizes = sorted({setting.batch_size for setting in done})
    evidence = {
        "limit": LIMIT,
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
        how = f"within {most:.3g} of {LIMIT} sigma, not bit-equal with {_words(unequal)}"
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
    return reference.rows(session.run_in_batches(inputs, setting.batch_size))


def _run_grid(
    passes: Passes, reference: Reference
) -> tuple[dict[Setting, Float32], dict[Setting, str]]:
    """Run the natural inputs at every setting; return what that gives, and what goes wrong."""
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
    """Return so many inputs, from the first on, and again where there are fewer."""
    return inputs[:rows] if rows <= len(inputs) else np.resize(inputs, (rows, *inputs.shape[1:]))


def _failures(done: Collection[Setting], failed: Mapping[Setting, str]) -> list[str]:
    """Say at which batch sizes the file fails, and with what."""
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


def _varied(done: Mapping[Setting, Float32], name: str) -> Iterator[Pair]:
    """Pair passes that differ in one thing alone with the first of them."""
    groups = defaultdict(list)
    for setting in done:
        groups[tuple((key, x) for key, x in vars(setting).items() if key != name)].append(setting)
    for first, *others in groups.values():
        for other in others:
            count = min(len(done[first]), len(done[other]))
            place = f"{getattr(other, name)} against {getattr(first, name)}"
            yield Pair(place, done[other][:count], done[first][:count], np.arange(count))


def _changed(
    passes: Passes, reference: Reference, done: Mapping[Setting, Float32], change: Change
) -> Iterator[Pair]:
    """Run changed inputs at settings that are done, and pair what both give for an input.

    Raises:
        RuntimeFailedError: A pass fails.
    """
    count = min(map(len, done.values()), default=0)
    rows, inputs = change(_rows(reference.natural.inputs, count))
    kept = np.flatnonzero(rows >= 0)
    for setting, expected in done.items():
        got = _run(passes, reference, setting, inputs)
        yield Pair(f"level {setting.level}", got[kept], expected[rows[kept]], rows[kept])


def _shuffled(inputs: Float32) -> tuple[npt.NDArray[np.intp], Float32]:
    """Return inputs in another order, and which each now is."""
    order = np.random.default_rng(0).permutation(len(inputs))
    return order, inputs[order]


def _beside_nan(inputs: Float32) -> tuple[npt.NDArray[np.intp], Float32]:
    """Return inputs with every second one NaN, and which each is, -1 for those."""
    changed = inputs.copy()
    changed[1::2] = np.nan
    rows = np.arange(len(inputs))
    rows[1::2] = -1
    return rows, changed


def _refuses_empty_batch(passes: Passes, reference: Reference) -> bool:
    """Tell whether the file fails with no input at all.

    Raises:
        WrongOutputError: It gives something.
    """
    try:
        for level in LEVELS:
            reference.rows(passes.session(level).run(reference.natural.inputs[:0]))
    except WrongOutputError:
        raise
    except RuntimeFailedError:
        return True
    return False
