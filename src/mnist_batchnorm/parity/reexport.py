"""Check ``re-export``: a new export of the checkpoint gives the same graph to the last bit."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from mnist_batchnorm.network.onnx import trace
from mnist_batchnorm.parity.graph import Chain, read_chain
from mnist_batchnorm.parity.layers import BatchNorm
from mnist_batchnorm.parity.operators import Array, Step
from mnist_batchnorm.parity.report import Check, one_line, verdict
from mnist_batchnorm.parity.structure import Pair, match
from mnist_batchnorm.parity.weights import WeightedLayer, affine, bits, tensors_of, weighted_layers


@dataclass(frozen=True)
class FreshExport:
    """Exports the checkpoint's network, in eval mode, once for all files."""

    model: nn.Sequential
    input_shape: tuple[int, ...]

    @cached_property
    def chains(self) -> dict[bool, Chain]:
        """The new exports, by whether batch norm is folded."""
        graphs = trace(self.model, self.input_shape)
        return {folded: read_chain(graph) for folded, graph in graphs.items()}


def check_reexport(fresh: FreshExport, chain: Chain, pairs: list[Pair]) -> Check:
    """Compare the file, read into ``chain``, with a new export of the checkpoint.

    Names, metadata and equivalent spellings do not count (see `read_chain`), every bit of every
    number does. Another tool that folds batch norm may round gamma / sqrt(var + eps) in its own
    way: see `is_known_fold`. ``pairs`` is empty if the network has unsupported layers.
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
        if len(forms) < len(chains):  # else the network has no batch norm to fold
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
        return int(np.count_nonzero(given))  # a bias of zeros equals a missing one
    if array.shape != other.shape or array.dtype != other.dtype:
        return max(array.size, other.size)
    if array.dtype != np.float32:
        return int((array != other).sum())
    return int((bits(array) != bits(other)).sum())


def _layer_differences(pairs: list[Pair], chains: dict[bool, Chain]) -> tuple[list[str], list[str]]:
    """Return the differences by layer, and the layers that only `is_known_fold` explains."""
    layers = [pair.layer for pair in pairs if pair.layer is not None]
    steps = {
        folded: {p.layer.name: p.step for p in match(layers, new.steps) if p.layer and p.step}
        for folded, new in chains.items()
    }
    holds = {part.layer.name: part for part in weighted_layers(pairs)}
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
        if found and part is not None and folded and is_known_fold(part):
            own.append(pair.layer.name)
        else:
            problems += found
    return problems, own


def is_known_fold(part: WeightedLayer) -> bool:
    """Whether the float32 fold of a known tool explains every bit of a folded layer.

    All round s = gamma / sqrt(var + eps), the products s w and (b - mean) s + beta, after each
    operation, in this order: onnxscript, onnx-simplifier and onnxslim as NumPy does, TorchScript's
    exporter with torch's own square root, whose last bit may differ.
    """
    assert part.batch_norm is not None
    batch_norm = part.batch_norm.module
    assert isinstance(batch_norm, BatchNorm)
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
