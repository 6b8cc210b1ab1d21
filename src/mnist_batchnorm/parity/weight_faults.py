"""Diagnosis: mistakes that turn the checkpoint's tensors into those of the file.

Each rule applies a known mistake to the correct numbers and compares. The rules only name a
difference that a check has found.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.parity.operators import Array
from mnist_batchnorm.parity.report import Diagnosis
from mnist_batchnorm.parity.weights import ROUNDOFF, bits

CLOSE = 2e-6  # relative tolerance: about 30 roundings


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor of the file that differs from the checkpoint's.

    Attributes:
        name: name in the checkpoint.
        got: the file's tensor, float32.
        right: the correct tensor, float32, of the same shape.
        last: whether it belongs to the network's last layer.
    """

    name: str
    got: Array
    right: Array
    last: bool

    @property
    def differs(self) -> npt.NDArray[np.bool_]:
        """Mask of the numbers that differ."""
        different: npt.NDArray[np.bool_] = bits(self.got) != bits(self.right)
        return different


def explain_tensors(tensors: Sequence[ChangedTensor], total: int) -> Iterator[Diagnosis]:
    """Yield what would have changed all these tensors at once, the surest explanation first.

    ``total`` is the number of tensors in the file.
    """
    names = ", ".join(t.name for t in tensors)
    if all(equal(t.got.byteswap(), t.right) for t in tensors):
        yield Diagnosis("byte-order", f"the bytes of each number of {names} are reversed")
    broken = [t.name for t in tensors if not np.isfinite(t.got).all()]
    if broken:
        yield Diagnosis("not-finite", f"{', '.join(broken)} holds NaN or infinity")
    count = sum(int(t.differs.sum()) for t in tensors)
    if count == 1:
        yield _one_number(tensors[0])
    yield from _rounded(tensors)
    yield from (found for tensor in tensors for found in _reordered(tensor))
    if 1 < count <= 4:
        yield Diagnosis("few-weights", f"{count} numbers of {names} differ")
    yield from (found for tensor in tensors for found in _zeroed(tensor))
    if len(tensors) == 2 and all(tensor.last for tensor in tensors):
        first, second = (common_factor(tensor.got, tensor.right) for tensor in tensors)
        if first is not None and second is not None and abs(first - second) < CLOSE * abs(first):
            text = f"{names} are {first:.6g} times the checkpoint's"
            yield Diagnosis("scaled-logits", text)
    yield from (found for tensor in tensors for found in _scaled(tensor))
    if 1 < count <= 16:
        yield Diagnosis("few-weights", f"{count} numbers of {names} differ")
    yield from _replaced(tensors, names, total)


def _one_number(tensor: ChangedTensor) -> Diagnosis:
    (at,) = np.argwhere(tensor.differs)
    got, right = (int(bits(array)[tuple(at)]) for array in (tensor.got, tensor.right))
    place = f"{tensor.name}{at.tolist()}"
    if (got ^ right).bit_count() == 1 or abs(got - right) == 1:
        return Diagnosis("bit-flip", f"{place} differs in one bit")
    return Diagnosis("few-weights", f"{place} differs, and nothing else")


def _rounded(tensors: Sequence[ChangedTensor]) -> Iterator[Diagnosis]:
    formats: dict[str, tuple[str, Callable[[Array], Array]]] = {
        "float16": ("float16", lambda x: x.astype(np.float16).astype(np.float32)),
        "bfloat16": ("bfloat16", lambda x: round_mantissa(x, 16)),
        "bfloat16, cut off": ("bfloat16", lambda x: (bits(x) & 0xFFFF0000).view(np.float32)),
        "TF32": ("tf32", lambda x: round_mantissa(x, 13)),
        "TF32, halves up": ("tf32", lambda x: ((bits(x) + 0x1000) & 0xFFFFE000).view(np.float32)),
        "TF32, cut off": ("tf32", lambda x: (bits(x) & 0xFFFFE000).view(np.float32)),
    }
    names = ", ".join(t.name for t in tensors)
    with np.errstate(all="ignore"):
        for what, (id_, rounding) in formats.items():
            if all(equal(t.got, rounding(t.right)) for t in tensors):
                yield Diagnosis(id_, f"weights rounded through {what}: {names}")
                return
        for digits in range(1, 9):
            if all(_decimal(t, digits) for t in tensors):
                text = f"weights rounded to {digits} decimals: {names}"
                yield Diagnosis("rounded-decimals", text)
                return
        matrices = [t for t in tensors if t.got.ndim > 1]
        if matrices and all(_on_a_grid(t) for t in matrices):
            text = f"weights on a grid of 256 values or fewer: {names}"
            yield Diagnosis("quantized", text)


def round_mantissa(array: Array, dropped: int) -> Array:
    """Round float32 numbers to nearest even without the last ``dropped`` bits."""
    whole = bits(array).astype(np.uint64)
    half = (np.uint64(1) << np.uint64(dropped - 1)) - np.uint64(1)
    odd = (whole >> np.uint64(dropped)) & np.uint64(1)
    kept = ((whole + half + odd) >> np.uint64(dropped)) << np.uint64(dropped)
    return kept.astype(np.uint32).view(np.float32)


def _decimal(tensor: ChangedTensor, digits: int) -> bool:
    exact = tensor.right.astype(np.float64)
    got = tensor.got.astype(np.float64)
    size = np.where(exact == 0, 1.0, np.abs(exact))
    significant = 10.0 ** (digits - 1 - np.floor(np.log10(size)))
    return any(
        bool(np.isclose(got, rounded, rtol=2 * ROUNDOFF, atol=0).all())
        for rounded in (np.round(exact, digits), np.round(exact * significant) / significant)
    )


def _on_a_grid(tensor: ChangedTensor) -> bool:
    got, right = (a.reshape(len(a), -1).astype(np.float64) for a in (tensor.got, tensor.right))
    if len(np.unique(got)) <= min(256, len(np.unique(right)) // 2):
        return True
    levels_a_row = max(len(np.unique(row)) for row in got)
    if levels_a_row <= min(256, got.shape[1] // 4):
        return True
    for axis in (None, 1):
        ends = [np.abs(got).max(axis=axis, keepdims=True)]
        low, high = (f(right, axis=axis, keepdims=True) for f in (np.min, np.max))
        for levels in (127, 7, 128, 8):
            steps = [ends[0] / levels, np.abs(right).max(axis=axis, keepdims=True) / levels]
            steps.append((np.maximum(high, 0) - np.minimum(low, 0)) / (2 * levels + levels % 2))
            for step in steps:
                index = got / np.where(step == 0, 1, step)
                on_grid = np.abs(index - np.round(index)) < 1e-3 * np.maximum(1, np.abs(index) / 8)
                if on_grid.all() and (np.abs(got - right) <= 1.01 * step).all():
                    return True
    return False


def _reordered(tensor: ChangedTensor) -> Iterator[Diagnosis]:
    got, right = tensor.got, tensor.right
    if got.ndim == 2 and got.shape == right.T.shape and equal(got, right.T):
        yield Diagnosis("transposed-weight", f"{tensor.name} is transposed")
    elif got.ndim == 2 and equal(got.ravel(), right.T.ravel()):
        yield Diagnosis("transposed-weight", f"{tensor.name} was laid out in columns")
    elif got.ndim == 4 and any(
        equal(got, turned) for turned in (right.swapaxes(2, 3), right[:, :, ::-1, ::-1])
    ):
        yield Diagnosis("transposed-weight", f"the kernels of {tensor.name} are turned")
    elif tensor.differs.sum() > 1:
        for axis in range(min(got.ndim, 2)):
            if _same_slices(np.moveaxis(got, axis, 0), np.moveaxis(right, axis, 0)):
                what = "rows" if axis == 0 else "columns"
                id_ = "permuted-labels" if tensor.last and axis == 0 else "permuted-units"
                yield Diagnosis(id_, f"the {what} of {tensor.name} are in another order")
                return


def _same_slices(a: Array, b: Array) -> bool:
    return sorted(x.tobytes() for x in a) == sorted(x.tobytes() for x in b)


def _zeroed(tensor: ChangedTensor) -> Iterator[Diagnosis]:
    where = tensor.differs
    if tensor.got[where].any():
        return
    dropped, kept = np.abs(tensor.right[where]), np.abs(tensor.right[~where & (tensor.got != 0)])
    if where.all() and tensor.name.endswith("bias"):
        yield Diagnosis("missing-bias", f"{tensor.name} is 0")
    elif _pruned(tensor.got) and kept.size and dropped.mean() < 0.7 * kept.mean():
        text = f"{where.sum():,} numbers of {tensor.name}, the smallest, are 0"
        yield Diagnosis("pruned-weights", text)
    else:
        yield Diagnosis("zeroed-weights", f"{where.sum():,} numbers of {tensor.name} are 0")


def _pruned(got: Array) -> bool:
    """Whether zeros are scattered, rather than whole rows or columns."""
    matrix = got.reshape(len(got), -1)
    return bool(matrix.any(axis=1).all()) and matrix.size > len(matrix)


def _scaled(tensor: ChangedTensor) -> Iterator[Diagnosis]:
    factor = common_factor(tensor.got, tensor.right)
    if factor is not None and tensor.got.size > 1:
        text = f"{tensor.name} is {factor:.6g} times the checkpoint's"
        yield Diagnosis("scaled-weights", text)


def _replaced(tensors: Sequence[ChangedTensor], names: str, total: int) -> Iterator[Diagnosis]:
    matrices = [t for t in tensors if t.got.ndim > 1]
    if not all(np.isfinite(t.got).all() for t in tensors):
        return
    gaps = [np.abs(t.got - t.right).max() / np.abs(t.right).max() for t in tensors]
    if len(tensors) >= 0.6 * total and len(matrices) > 1 and max(gaps) > 1e-3:
        alike = min(_correlation(t.got, t.right) for t in matrices)
        text = f"nearly all weights are others (correlation {alike:.4g}): another training or epoch"
        yield Diagnosis("other-run", text)
    count = sum(int(t.differs.sum()) for t in tensors)
    yield Diagnosis("noisy-weights", f"{count:,} numbers of {names} differ")


def _correlation(a: Array, b: Array) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm else 0.0


def common_factor(got: Array, right: Array) -> float | None:
    """Return the factor other than 1 by which all numbers were multiplied, if there is one."""
    used = right != 0
    if not used.any() or got[~used].any():
        return None
    ratio = got[used].astype(np.float64) / right[used]
    factor = float(np.median(ratio))
    alike = np.isfinite(ratio).all() and np.allclose(ratio, factor, rtol=CLOSE, atol=0)
    return factor if alike and factor != 0 and abs(factor - 1) > CLOSE else None


def equal(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same float32 numbers, bit for bit."""
    return a.shape == b.shape and bool(
        (bits(a.astype(np.float32)) == bits(b.astype(np.float32))).all()
    )


def is_close(got: Array, value: Array, size: Array | None = None) -> bool:
    """Whether numbers are equal up to `CLOSE`, relative to ``size`` or else to the value."""
    size = np.abs(value) if size is None else size
    with np.errstate(all="ignore"):
        return bool((np.abs(got - value) <= CLOSE * size).all())
