"""An ONNX file loaded into ONNX Runtime for measuring."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import read_output
from mnist_batchnorm.core.paths import WEIGHTS_KEY
from mnist_batchnorm.parity import runtime


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file, its SHA-256, and the session that runs it."""

    path: Path
    sha256: str
    session: runtime.Session

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of its checkpoint, if the file records it."""
        return self.session.metadata.get(WEIGHTS_KEY)

    def logits(self, inputs: Float32, batch_size: int) -> Float32:
        """Return the logits, ``[n, 10]``, of inputs ``[n, 784]``.

        Raises:
            CheckFailedError: The model does not run, or its output is not finite logits.
        """
        try:
            logits = self.session.run_in_batches(inputs, batch_size)
        except runtime.RuntimeFailedError as error:
            raise CheckFailedError(
                f"{self.path} does not run at batch size {batch_size}: {error}"
            ) from None
        if logits.shape != (len(inputs), CLASSES) or logits.dtype != np.float32:
            raise CheckFailedError(
                f"{self.path} gives {logits.dtype} {logits.shape} at batch size {batch_size}, "
                f"expected float32 {(len(inputs), CLASSES)}"
            )
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            raise CheckFailedError(
                f"{self.path} gives NaN or infinite logits for {bad.sum()} of {len(inputs)} "
                f"images at batch size {batch_size}"
            )
        return logits


def load_onnx_model(path: Path) -> OnnxModel:
    """Load an ONNX file into ONNX Runtime, on the CPU.

    Raises:
        UserError: The file is missing, unreadable or not an ONNX model.
    """
    content = read_output(path, "export")
    try:
        session = runtime.load(content)
    except runtime.RuntimeFailedError as error:
        raise UserError(
            f"{path} is not an ONNX model that runs: {error}; `dvc repro export` makes it again"
        ) from None
    return OnnxModel(path, sha256(content).hexdigest(), session)
