"""Diagnosis: the mistakes that would explain the failed checks, the likeliest first.

A diagnosis decides nothing: a file is rejected because a check failed, whatever its cause.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from mnist_batchnorm.parity import batch_norm_faults, graph_faults, weight_faults
from mnist_batchnorm.parity.graph_faults import Findings
from mnist_batchnorm.parity.layers import BatchNorm
from mnist_batchnorm.parity.report import Diagnosis
from mnist_batchnorm.parity.weight_faults import ChangedTensor, equal
from mnist_batchnorm.parity.weights import (
    WeightedLayer,
    stored_tensors,
    tensors_of,
    weighted_layers,
)

# certain from the numbers alone, so reported before anything about batch norm
SURE = {
    *("byte-order", "not-finite", "bit-flip", "permuted-units", "permuted-labels"),
    *("float16", "bfloat16", "tf32", "rounded-decimals", "quantized", "transposed-weight"),
}


def diagnose(findings: Findings) -> list[Diagnosis]:
    """Return the mistakes that would explain the failed checks, one of each kind."""
    if not any(check.status == "failed" for check in findings.checks.values()):
        return []
    named: dict[str, Diagnosis] = {}
    with np.errstate(all="ignore"):
        for rule in RULES:
            try:
                for diagnosis in rule(findings):
                    named.setdefault(diagnosis.id, diagnosis)
            except Exception as error:  # noqa: BLE001 - the verdict stands, whatever its reason
                text = f"{rule.__name__} itself failed: {type(error).__name__}: {error}"
                named.setdefault("undiagnosed", Diagnosis("undiagnosed", text))
    return list(named.values())


def _numbers(findings: Findings) -> Iterator[Diagnosis]:
    layers = weighted_layers(findings.pairs)
    for problem in findings.checks["weights"].problems:
        if problem.startswith("the checkpoint's own"):
            yield Diagnosis("not-finite", problem)
    changed = list(_changed(findings))
    count = sum(int(tensor.differs.sum()) for tensor in changed)
    total = sum(len(tensors_of(part.layer)) for part in layers)
    by_tensor = list(weight_faults.explain_tensors(changed, total)) if changed else []
    for tensor in changed:
        turned = tensor.got.ndim == 2 and equal(tensor.got, tensor.right.T)
        if turned and any(equal(a, tensor.right) for a in findings.chain.stored.values()):
            yield Diagnosis("gemm-attributes", f"transB is wrong for {tensor.name}")
    sure = SURE | ({"few-weights"} if count <= 4 else set())
    yield from (diagnosis for diagnosis in by_tensor if diagnosis.id in sure)
    yield from _batch_norm(findings, changed, layers, count)
    yield from by_tensor


def _batch_norm(
    findings: Findings, changed: list[ChangedTensor], layers: list[WeightedLayer], count: int
) -> Iterator[Diagnosis]:
    names = {tensor.name.rpartition(".")[0] for tensor in changed}
    affected = [part for part in layers if part.layer.name in names]
    network = [pair.layer for pair in findings.pairs if pair.layer]
    if count > 1:
        for part in affected:
            if isinstance(part.layer.module, BatchNorm):
                yield from batch_norm_faults.explain_batch_norm(part, layers)
            elif part.batch_norm is not None:
                norms = [layer for layer in network if isinstance(layer.module, BatchNorm)]
                yield from batch_norm_faults.explain_fold(part, norms)
    kept = [part for part in layers if isinstance(part.layer.module, BatchNorm)]
    followers = {before.name: after for before, after in pairwise(network)}
    for part in affected:
        after = followers.get(part.layer.name)
        if after and any(norm.layer is after for norm in kept) and _holds_fold(findings, part):
            text = f"{after.name} is both folded into {part.layer.name} and kept"
            yield Diagnosis("double-batch-norm", text)
    if count > 1 and all(tensor.got.ndim == 1 for tensor in changed):
        yield from batch_norm_faults.explain_statistics(kept)


def _holds_fold(findings: Findings, part: WeightedLayer) -> bool:
    fold = findings.folds.get(part.layer.name, {}).get("weight")
    weight = part.step.tensors.get("weight")
    return (
        part.batch_norm is None
        and fold is not None
        and weight is not None
        and weight.shape == fold.shape
        and bool(np.allclose(weight, fold, rtol=1e-5, atol=0))
        and not np.array_equal(weight, tensors_of(part.layer)["weight"])
    )


def _changed(findings: Findings) -> Iterator[ChangedTensor]:
    layers = weighted_layers(findings.pairs)
    for part in layers:
        for stored in stored_tensors(part):
            right = stored.exact.astype(np.float32)
            if stored.limit is not None:
                fold = findings.folds.get(part.layer.name, {})
                right = fold.get(stored.name.rpartition(".")[2], right)
            if stored.array is not None and stored.readable and not equal(stored.array, right):
                yield ChangedTensor(stored.name, stored.array, right, part is layers[-1])


def _shapes(findings: Findings) -> Iterator[Diagnosis]:
    for part in weighted_layers(findings.pairs):
        for stored in stored_tensors(part):
            if stored.array is None:
                if stored.name.endswith("bias"):
                    yield Diagnosis("missing-bias", f"{stored.name} is not in the file")
            elif stored.array.shape != stored.exact.shape:
                text = f"{stored.name} is {stored.array.shape}, not {stored.exact.shape}"
                turned = stored.array.shape == stored.exact.shape[::-1] and stored.array.ndim > 1
                yield Diagnosis("transposed-weight" if turned else "other-run", text)


RULES: tuple[Callable[[Findings], Iterator[Diagnosis]], ...] = (
    graph_faults.container,
    graph_faults.mode,
    graph_faults.precision,
    graph_faults.batch_axis_frozen,
    graph_faults.interface,
    graph_faults.corrupt_file,
    graph_faults.origin,
    graph_faults.coupled_rows,
    graph_faults.foreign_operators,
    graph_faults.additional_operators,
    graph_faults.casts,
    graph_faults.replaced_layers,
    graph_faults.moved_layers,
    graph_faults.attributes,
    _numbers,
    _shapes,
    graph_faults.hidden_content,
)
