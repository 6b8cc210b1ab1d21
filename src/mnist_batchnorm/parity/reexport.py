"""Does the checkpoint, exported afresh, give the same graph to the last bit?"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from mnist_batchnorm.network.onnx import trace
from mnist_batchnorm.parity.graph import Array, Chain, Step, read_chain
from mnist_batchnorm.parity.report import Check, one_line, verdict
from mnist_batchnorm.parity.structure import Pair, match
from mnist_batchnorm.parity.weights import Fused, affine, bits, fused, tensors_of


@dataclass(frozen=True)
class FreshExport:
    """The checkpoint's network, exported when first asked for, once for all files.

    Attributes:
        model: in eval mode, with the checkpoint's weights.
        input_shape: of one input, without the batch axis.
    """

    model: nn.Sequential
    input_shape: tuple[int, ...]

    @cached_property
    def chains(self) -> dict[bool, Chain]:
        """What today's exporter writes, by whether batch norm is folded."""
        graphs = trace(self.model, self.input_shape)
        return {folded: read_chain(graph) for folded, graph in graphs.items()}


def check_reexport(fresh: FreshExport, chain: Chain, pairs: list[Pair]) -> Check:
    """Compare the file with what the exporter makes of the checkpoint today.

    Operators, attributes and tensors are compared as `read_chain` reads them, so that names,
    metadata and spelling do not count; every bit of every number does. Another tool that folds
    batch norm may round gamma / sqrt(var + eps) in its own way: see `own_fold`.

    Args:
        fresh: the checkpoint's network.
        chain: the file.
        pairs: its steps, matched with the network's layers; empty when the gate does not know
            all of these.
    """
    try:
        chains = fresh.chains
    except Exception as error:  # noqa: BLE001 - the exporter's errors share no other base
        why = f"torch.onnx cannot export the network: {one_line(error)}"
        return Check("re-export", "not judged", why)
    exporter = f"a fresh export by torch {torch.__version__.partition('+')[0]}"
    forms = [
        "folded" if folded else "kept"
        for folded, new in chains.items()
        if not chain.problems and not _chain_differences(chain, new)
    ]
    if forms:
        how = f"equal, bit for bit, to {exporter}"
        if len(forms) < len(chains):  # else there is no batch norm that could be folded
            how += f" with batch norm {forms[0]}"
        return Check("re-export", "passed", how, {"equal_to": " and ".join(forms)})
    if not pairs:
        found = min((_chain_differences(chain, new) for new in chains.values()), key=len)
        return verdict("re-export", chain.problems + found, "", {"equal_to": None})
    problems, own = _layer_differences(pairs, chains)
    return verdict(
        "re-export",
        [f"differs from {exporter}: {problem}" for problem in chain.problems + problems],
        f"equal, bit for bit, to {exporter}"
        + f", but for {', '.join(own)}, which another tool folded" * bool(own),
        {"equal_to": None if problems else "kept and folded layers", "own_fold": own},
    )


def _chain_differences(chain: Chain, new: Chain) -> list[str]:
    got, expected = ([step.operator for step in c.steps] for c in (chain, new))
    if got != expected:
        return [f"operators are {' '.join(got)}, expected {' '.join(expected)}"]
    return [
        difference
        for old, fresh in zip(chain.steps, new.steps, strict=True)
        for difference in _step_differences(old, fresh)
    ]


def _step_differences(step: Step, new: Step) -> list[str]:
    problems = []
    given, expected = (
        {key: value for key, value in s.attributes.items() if key != "features"}
        for s in (step, new)
    )
    if given != expected:
        problems.append(f"{step.where} has attributes {given}, expected {expected}")
    for name in sorted(step.tensors.keys() | new.tensors.keys()):
        array, other = step.tensors.get(name), new.tensors.get(name)
        count = _differing(array, other)
        if count:
            problems.append(f"{count:,} numbers of {step.where}'s {name} differ")
    return problems


def _differing(array: Array | None, other: Array | None) -> int:
    if array is None or other is None:
        given = array if other is None else other
        assert given is not None
        return int(np.count_nonzero(given))  # a bias of zeros is none
    if array.shape != other.shape or array.dtype != other.dtype:
        return max(array.size, other.size)
    if array.dtype != np.float32:
        return int((array != other).sum())
    return int((bits(array) != bits(other)).sum())


def _layer_differences(pairs: list[Pair], chains: dict[bool, Chain]) -> tuple[list[str], list[str]]:
    """Compare layer by layer: one tool keeps what another folds.

    Returns:
        What differs, and the layers that only `own_fold` explains.
    """
    layers = [pair.layer for pair in pairs if pair.layer is not None]
    steps = {
        folded: {p.layer.name: p.step for p in match(layers, new.steps) if p.layer and p.step}
        for folded, new in chains.items()
    }
    holds = {part.layer.name: part for part in fused(pairs)}
    problems, own = [], []
    for pair in pairs:
        if pair.layer is None or pair.step is None:
            if pair.folded:
                continue
            what = pair.step.where if pair.step else pair.layer.name if pair.layer else ""
            problems.append(f"{what} is on one side only")
            continue
        part = holds.get(pair.layer.name)
        folded = part is not None and part.batch_norm is not None
        new = steps[folded].get(pair.layer.name)
        found = _step_differences(pair.step, new) if new else [f"{pair.step.where} is new"]
        if found and part is not None and folded and own_fold(part):
            own.append(pair.layer.name)
        else:
            problems += found
    return problems, own


def own_fold(part: Fused) -> bool:
    """Tell whether a known float32 fold explains every bit of a folded layer.

    All round s = gamma / sqrt(var + eps), the products s w and (b - mean) s + beta, after each
    operation, in this order: onnxscript, onnx-simplifier and onnxslim as NumPy does, TorchScript's
    exporter with torch's own square root, whose last bit may differ. A flipped bit is neither.
    """
    assert part.batch_norm is not None
    batch_norm = part.batch_norm.module
    assert isinstance(batch_norm, nn.BatchNorm1d | nn.BatchNorm2d)
    own, norm = tensors_of(part.layer), affine(part.batch_norm)
    variance = norm["running_var"]
    scales = (
        norm["weight"] / np.sqrt(variance + np.float32(batch_norm.eps)),
        norm["weight"] / torch.from_numpy(variance).add(batch_norm.eps).sqrt().numpy(),
    )
    return any(
        not _differing(part.step.tensors.get("weight"), _rows(own["weight"], scale))
        and not _differing(
            part.step.tensors.get("bias"),
            (own.get("bias", np.float32(0)) - norm["running_mean"]) * scale + norm["bias"],
        )
        for scale in scales
    )


def _rows(weight: Array, scale: Array) -> Array:
    product: Array = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return product
