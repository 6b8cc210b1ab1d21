"""Check ``behaviour``: the file predicts the network's classes, with its accuracy."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.parity.error_model import ALARM_SIGMAS
from mnist_batchnorm.parity.reference import REAL, Family, Reference
from mnist_batchnorm.parity.report import Check, verdict
from mnist_batchnorm.parity.runtime import Passes, RuntimeFailedError

SYNTHETIC = ("normal", "uniform")

Classes = npt.NDArray[np.intp]


@np.errstate(all="ignore")  # an overflow or a NaN is a finding
def check_behavior(passes: Passes, reference: Reference) -> Check:
    """Compare the class of every input with float64's, and the accuracies.

    Classes may differ only if float64's two largest outputs are so close that rounding decides.
    Without real inputs, the normal and uniform ones are compared.
    """
    names = [REAL] if REAL in reference.families else SYNTHETIC
    families = [reference.families[name] for name in names]
    count = sum(len(family.inputs) for family in families)
    kind = " and ".join(names)
    try:
        got = [reference.flatten(passes.run(family.name, family.inputs)) for family in families]
    except RuntimeFailedError as error:
        return verdict("behaviour", [str(error)], "", {"kind": kind, "inputs": count})
    file = np.concatenate([_classes(outputs) for outputs in got])
    exact = np.concatenate([_classes(family.exact) for family in families])
    pytorch = np.concatenate([_classes(family.pytorch) for family in families])
    undecided = np.concatenate([_undecided(family) for family in families])
    differ = np.flatnonzero((file != exact) & ~undecided)
    accuracy = {
        name: None if reference.labels is None else float((classes == reference.labels).mean())
        for name, classes in {"onnxruntime": file, "pytorch": pytorch, "float64": exact}.items()
    }
    problems = []
    if differ.size:
        at = differ[0]
        problems.append(
            f"the class of {differ.size:,} of {count:,} {kind} inputs differs, first of input "
            f"{at}: {file[at]}, float64 gives {exact[at]}"
        )
        if reference.labels is not None:
            problems.append(
                f"accuracy {accuracy['onnxruntime']:.4f}, PyTorch has {accuracy['pytorch']:.4f}"
            )
    evidence: dict[str, Any] = {
        "kind": kind,
        "inputs": count,
        "differences": int(differ.size),
        "undecided": int(undecided.sum()),
        "accuracy": accuracy,
    }
    success = f"the class of all {count:,} {kind} inputs is float64's"
    if undecided.any():
        success += f", but for {undecided.sum():,} that rounding decides"
    if reference.labels is not None:
        success += (
            f"; accuracy {accuracy['onnxruntime']:.4f}, PyTorch {accuracy['pytorch']:.4f}, "
            f"float64 {accuracy['float64']:.4f}"
        )
    return verdict("behaviour", problems, success, evidence)


def _classes(outputs: npt.NDArray[np.floating[Any]]) -> Classes:
    """Return the index of each row's largest output, ``[n]``; -1 for rows with a NaN."""
    classes: Classes = np.where(np.isnan(outputs).any(axis=1), -1, outputs.argmax(axis=1))
    return classes


def _undecided(family: Family) -> npt.NDArray[np.bool_]:
    """Return the rows whose class depends on rounding, ``[n]``.

    Outside the error model, those where PyTorch's own float32 disagrees with float64.
    """
    rows, best = np.arange(len(family.exact)), family.exact.argmax(axis=1)
    lowest = (family.exact - ALARM_SIGMAS * family.sigma)[rows, best]
    others = family.exact + ALARM_SIGMAS * family.sigma
    others[rows, best] = -np.inf
    close: npt.NDArray[np.bool_] = lowest <= others.max(axis=1)
    return np.where(
        family.judged.all(axis=1), close, _classes(family.pytorch) != _classes(family.exact)
    )
