"""The gate: a file on disk against a checkpoint on disk, every check run, none skipped."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest
from mnist_batchnorm.layout import WEIGHTS_KEY
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity.outputs import Reference, check_outputs
from mnist_batchnorm.parity.report import Check, verdict
from mnist_batchnorm.parity.structure import check_structure
from mnist_batchnorm.parity.weights import check_weights


@dataclass(frozen=True)
class GraphReport:
    """What the gate found about one ONNX file.

    Attributes:
        sha256: of the file that was judged, so that the verdict cannot be used for another.
        checks: every check, in order.
    """

    sha256: str
    checks: list[Check]

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
            "argmax_differences": self.outputs.get("argmax_differences"),
            "checks": [asdict(check) for check in self.checks],
        }


def check_graph(
    path: Path,
    weights: Path,
    checkpoint: Checkpoint,
    reference: Reference,
    batch_sizes: Sequence[int],
    limit: float,
) -> GraphReport:
    """Judge one ONNX file against the checkpoint it should be.

    Args:
        path: the ONNX file.
        weights: the checkpoint's file.
        checkpoint: its content.
        reference: images and what the checkpoint's network makes of them.
        batch_sizes: images a call to ONNX Runtime.
        limit: largest error over the row's largest logit.

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
    return GraphReport(
        file_hash,
        [
            check_provenance(proto, weights),
            check_structure(proto, checkpoint.architecture),
            check_weights(proto, checkpoint),
            check_outputs(content, reference, batch_sizes, limit),
        ],
    )


def check_provenance(proto: onnx.ModelProto, weights: Path) -> Check:
    """Compare the checkpoint's hash with the one that the file says it was made from."""
    expected = digest(weights)
    embedded = {entry.key: entry.value for entry in proto.metadata_props}
    claimed = embedded.get(WEIGHTS_KEY)
    if claimed is None:
        problems = [f"the file does not say which checkpoint made it ({WEIGHTS_KEY} is missing)"]
    elif claimed != expected:
        problems = [f"made from checkpoint {claimed[:12]}, but {weights} is {expected[:12]}"]
    else:
        problems = []
    return verdict(
        "provenance", problems, f"made from this very checkpoint ({expected[:12]})", embedded
    )
