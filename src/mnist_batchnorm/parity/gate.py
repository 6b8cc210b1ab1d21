"""The gate: a file on disk against a checkpoint on disk, every check run, none skipped."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity.outputs import Float64, Reference, check_outputs
from mnist_batchnorm.parity.provenance import check_provenance, undecodable
from mnist_batchnorm.parity.report import Check, verdict
from mnist_batchnorm.parity.structure import check_structure, file_problems
from mnist_batchnorm.parity.weights import check_weights


@dataclass(frozen=True)
class GraphReport:
    """What the gate found about one ONNX file.

    Attributes:
        sha256: of the file that was judged, so that the verdict cannot be used for another.
        checks: every check, in order.
        errors: each image's largest relative error of all passes, float64 ``[n]``; None when no
            pass ran to its end.
    """

    sha256: str
    checks: list[Check]
    errors: Float64 | None = field(default=None, repr=False, compare=False)

    @property
    def parity(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def outputs(self) -> dict[str, Any]:
        """The evidence of the check on outputs; empty when the file could not even be read."""
        return next((check.evidence for check in self.checks if check.name == "outputs"), {})

    def to_json(self) -> dict[str, Any]:
        """Return the report as ``reports/parity.json`` holds it."""
        return {
            "sha256": self.sha256,
            "parity": self.parity,
            "max_relative_error": self.outputs.get("max_relative_error"),
            "limit": self.outputs.get("limit"),
            "max_relative_error_vs_pytorch": self.outputs.get("max_relative_error_vs_pytorch"),
            "argmax_differences": self.outputs.get("argmax_differences"),
            "checks": [asdict(check) for check in self.checks],
        }


@np.errstate(all="ignore")  # an overflow or a NaN is a finding
def check_graph(
    path: Path,
    weights: Path,
    checkpoint: Checkpoint,
    reference: Reference,
    batch_sizes: Sequence[int],
    limit: float,
    *,
    folded: bool,
) -> GraphReport:
    """Judge one ONNX file against the checkpoint it should be.

    Args:
        path: the ONNX file.
        weights: the checkpoint's file.
        checkpoint: its content.
        reference: images and what the checkpoint's network makes of them.
        batch_sizes: images a call to ONNX Runtime.
        limit: largest error over the row's largest logit.
        folded: whether the file must have batch norm folded into the Gemm before, or kept.

    Returns:
        A report; a bad file is a finding of it, not an exception.

    Raises:
        UserError: The ONNX file cannot be read from disk.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; run `dvc repro export`"
        ) from None
    file_hash = sha256(content).hexdigest()
    try:
        proto = onnx.load_from_string(content)
    except DecodeError as error:
        damaged = Check("file", False, f"not an ONNX file, or only a part of one: {error}")
        return GraphReport(file_hash, [damaged])
    if parts := undecodable(proto):
        damaged = Check("file", False, f"text that is not UTF-8 in {', '.join(parts)}")
        return GraphReport(file_hash, [damaged])
    outputs, errors = check_outputs(content, reference, batch_sizes, limit)
    checks = [
        check_provenance(proto, weights, checkpoint),
        *_check_content(proto, checkpoint, folded),
        outputs,
    ]
    return GraphReport(file_hash, checks, errors)


def _check_content(proto: onnx.ModelProto, checkpoint: Checkpoint, folded: bool) -> list[Check]:
    if problems := file_problems(proto):
        return [
            verdict("structure", problems, "", {}),
            Check("weights", False, "not compared: not a valid ONNX file on its own"),
        ]
    return [
        check_structure(proto, checkpoint.architecture, folded),
        check_weights(proto, checkpoint, folded),
    ]
