"""The gate: runs every check on an ONNX file and the checkpoint that it was exported from."""

import copy
import io
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from mnist_batchnorm.core.arrays import Float32, Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.network.model import Checkpoint, load_checkpoint
from mnist_batchnorm.parity.behavior import check_behavior
from mnist_batchnorm.parity.diagnosis import diagnose
from mnist_batchnorm.parity.graph import decode, file_problems, read_chain
from mnist_batchnorm.parity.graph_faults import Findings
from mnist_batchnorm.parity.invariance import check_invariance
from mnist_batchnorm.parity.layers import list_layers
from mnist_batchnorm.parity.probes import check_probes, relative_errors
from mnist_batchnorm.parity.provenance import check_provenance
from mnist_batchnorm.parity.reexport import FreshExport, check_reexport
from mnist_batchnorm.parity.reference import Labels, Reference
from mnist_batchnorm.parity.report import CHECKS, Check, Diagnosis, ParityReport, one_line, verdict
from mnist_batchnorm.parity.runtime import Passes
from mnist_batchnorm.parity.structure import Interface, check_structure, match
from mnist_batchnorm.parity.weights import check_weights, weighted_layers


class Gate:
    """Judges any number of ONNX files against the network of one checkpoint.

    Args:
        weights: checkpoint: safetensors, or a ``state_dict`` that torch.save wrote.
        model: network; its own weights are ignored. None if ``weights`` is a checkpoint of this
            project, which contains its architecture.
        inputs: real inputs, float32 ``[n, ...]``; None to judge by synthetic inputs alone.
        labels: classes of the inputs, integers ``[n]``.
        input_shape: shape of one input, without the batch axis; by default that of ``inputs`` or
            of a first Linear.
        checkpoint: content of ``weights``, if it is a checkpoint of this project and was read
            already.

    Raises:
        UserError: The checkpoint cannot be read or does not fit the model, or the inputs do not.
    """

    def __init__(
        self,
        weights: Path | str,
        *,
        model: nn.Sequential | None = None,
        inputs: Float32 | None = None,
        labels: Labels | None = None,
        input_shape: tuple[int, ...] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.weights = Path(weights)
        if model is None:
            checkpoint = checkpoint or load_checkpoint(self.weights)
            self.weights_sha256, self.model = checkpoint.sha256, checkpoint.model()
        else:
            content = _read(self.weights)
            self.weights_sha256 = sha256(content).hexdigest()
            self.model = _with_weights(model, content, self.weights)
        self.input_shape = input_shape or _input_shape(self.model, inputs)
        try:
            self.layers, self.unknown = list_layers(self.model, self.input_shape)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the network does not take inputs of shape {self.input_shape}: {one_line(error)}"
            ) from None
        self.fresh = FreshExport(self.model, self.input_shape)
        self.reference = Reference(
            self.model, [] if self.unknown else self.layers, self.input_shape, inputs, labels
        )

    def check(
        self,
        file: Path | str,
        *,
        content: bytes | None = None,
        input_name: str | None = None,
        output_name: str | None = None,
        opset: int | None = None,
        folded: bool | None = None,
        provenance: Mapping[str, str] | None = None,
        require_provenance: bool = False,
    ) -> ParityReport:
        """Judge one ONNX file, whose ``content`` may have been read already; see `check`.

        Raises:
            UserError: The file cannot be read from disk. An invalid file is a finding.
        """
        if content is None:
            content = _read(Path(file))

        def report(
            checks: list[Check], diagnoses: list[Diagnosis], errors: Float64 | None = None
        ) -> ParityReport:
            onnx_sha256, name = sha256(content).hexdigest(), Path(file).as_posix()
            weights = self.weights.as_posix(), self.weights_sha256
            return ParityReport(name, onnx_sha256, *weights, checks, diagnoses, errors)

        proto = decode(content)
        if isinstance(proto, str):
            checks = [Check("file", "failed", proto, {"problems": [proto]})]
            checks += [Check(name, "not judged", "there is no graph") for name in CHECKS[1:]]
            return report(checks, [Diagnosis("corrupt-file", proto)])
        interface = Interface(
            self.input_shape, self.reference.output_shape, input_name, output_name, opset
        )
        chain = read_chain(proto)
        pairs = [] if self.unknown else match(self.layers, chain.steps)
        passes = Passes(content)
        with np.errstate(all="ignore"):  # an overflow or a NaN is a finding
            structure = check_structure(proto, chain, pairs, interface, folded)
            checks = [
                _check_file(proto),
                check_provenance(proto, provenance or {}, required=require_provenance),
                structure if structure.status == "failed" else self._only_if_known(structure),
                self._only_if_known(check_weights(pairs)),
                check_reexport(self.fresh, chain, pairs),
                check_probes(passes, self.reference),
                check_invariance(passes, self.reference),
                check_behavior(passes, self.reference),
            ]
        by_name = {check.name: check for check in checks}
        findings = Findings(proto, chain, pairs, interface, self._folds(), by_name)
        return report(checks, diagnose(findings), relative_errors(passes, self.reference))

    def _only_if_known(self, check: Check) -> Check:
        if not self.unknown:
            return check
        return Check(check.name, "not judged", "; ".join(self.unknown), check.evidence)

    def _folds(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the exporter's own folded tensors by layer; empty if the export failed."""
        if self.unknown or "chains" not in vars(self.fresh):
            return {}
        pairs = match(self.layers, self.fresh.chains[True].steps)
        return {
            part.layer.name: part.step.tensors
            for part in weighted_layers(pairs)
            if part.batch_norm is not None
        }


def check(
    file: Path | str,
    weights: Path | str,
    *,
    model: nn.Sequential | None = None,
    inputs: Float32 | None = None,
    labels: Labels | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_name: str | None = None,
    output_name: str | None = None,
    opset: int | None = None,
    folded: bool | None = None,
    provenance: Mapping[str, str] | None = None,
    require_provenance: bool = False,
) -> ParityReport:
    """Judge whether an ONNX file computes what a checkpoint's network computes in eval mode.

    To judge several files of one checkpoint, a `Gate` is faster.

    Args:
        file: ONNX file.
        weights: checkpoint: safetensors, or a ``state_dict`` that torch.save wrote.
        model: network, an nn.Sequential of the layers in docs/parity.md; its own weights are
            ignored. None if ``weights`` is a checkpoint of this project.
        inputs: real inputs, float32 ``[n, ...]``; None to judge by synthetic inputs alone.
        labels: classes of the inputs, integers ``[n]``.
        input_shape: shape of one input, without the batch axis; by default that of ``inputs`` or
            of a first Linear.
        input_name: name of the graph's input; None for any.
        output_name: name of the graph's output; None for any.
        opset: version of ONNX's own operators; None for any from 9.
        folded: whether every batch norm must be folded into the layer before it, or kept; None
            for either.
        provenance: expected metadata; a key with another value fails.
        require_provenance: whether all of it must be present, and nothing else.

    Raises:
        UserError: A file is missing, or the checkpoint is unreadable or does not fit the model.
            An invalid ONNX file is a finding.
    """
    gate = Gate(weights, model=model, inputs=inputs, labels=labels, input_shape=input_shape)
    return gate.check(
        file,
        input_name=input_name,
        output_name=output_name,
        opset=opset,
        folded=folded,
        provenance=provenance,
        require_provenance=require_provenance,
    )


def _check_file(proto: onnx.ModelProto) -> Check:
    evidence = {"producer": f"{proto.producer_name} {proto.producer_version}".strip()}
    return verdict("file", file_problems(proto), "one valid ONNX file", evidence)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _with_weights(model: nn.Sequential, content: bytes, weights: Path) -> nn.Sequential:
    state = _read_state(content, weights)
    floats = {name: t for name, t in state.items() if t.is_floating_point()}
    if wrong := [name for name, t in floats.items() if t.dtype != torch.float32]:
        raise UserError(f"{weights} holds {', '.join(wrong)} in another type than float32")
    network = copy.deepcopy(model).cpu()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{weights} does not fit the model: {one_line(error)}") from None
    return network.eval()


def _read_state(content: bytes, weights: Path) -> dict[str, Tensor]:
    if content.startswith((b"PK", b"\x80")):  # a zip or a pickle: what torch.save writes
        try:
            state: dict[str, Tensor] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except Exception as error:  # noqa: BLE001 - torch.load's errors share no other base
            raise UserError(f"{weights} cannot be read: {one_line(error)}") from None
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{weights} holds something else than a state_dict")
        return state
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise UserError(
            f"{weights} is neither safetensors nor written by torch.save: {error}"
        ) from None


def _input_shape(model: nn.Sequential, inputs: Float32 | None) -> tuple[int, ...]:
    if inputs is not None:
        return inputs.shape[1:]
    first = next((m for m in model.modules() if not isinstance(m, nn.Sequential)), None)
    if not isinstance(first, nn.Linear):
        raise UserError(
            "input_shape, the shape of one input, is required: the first layer is not a Linear"
        )
    return (first.in_features,)


def assert_parity(file: Path | str, weights: Path | str, **options: Any) -> ParityReport:
    """Judge as `check`, with its options, in a test.

    Raises:
        AssertionError: The verdict is not parity; the message is the report's table.
        UserError: As `check`.
    """
    report = check(file, weights, **options)
    if not report.parity:
        raise AssertionError("\n" + report.table())
    return report
