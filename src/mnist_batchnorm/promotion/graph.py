"""TODO."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import WEIGHTS_KEY
from mnist_batchnorm.parity import runtime


@dataclass(frozen=True)
class Graph:
    """An ONNX file in memory, ready to run.

    Attributes:
        sha256: of the file.
        session: from float32 ``[batch, 784]`` to the file's own output.
    """

    path: Path
    sha256: str
    session: runtime.Session

    @property
    def weights_sha256(self) -> str | None:
        """Of the checkpoint that the file says it was made from, if it does."""
        return self.session.metadata.get(WEIGHTS_KEY)

    def logits(self, inputs: Float32, batch_size: int) -> Float32:
        """Run all inputs, ``batch_size`` at a time; float32 ``[n, 10]``.

        Raises:
            CheckFailedError: It cannot, or its outputs are not finite logits of that shape.
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


def load_graph(path: Path) -> Graph:
    """Load an ONNX file into ONNX Runtime, on the CPU.

    Raises:
        UserError: The file is missing, unreadable or not an ONNX model.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro export` first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        session = runtime.load(content)
    except runtime.RuntimeFailedError as error:
        raise UserError(
            f"{path} is not an ONNX model that runs: {error}; `dvc repro export` makes it again"
        ) from None
    return Graph(path, sha256(content).hexdigest(), session)
