"""Load models for serving: only files, identified by their hash, that the parity gate passed."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnist_batchnorm.artifacts.parity_report import HASH_DIGITS, Parity, why_unproven
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.registry_file import registered_version
from mnist_batchnorm.artifacts.splits import CLASSES, network_input
from mnist_batchnorm.core.arrays import relative_change
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import read_output
from mnist_batchnorm.core.paths import WEIGHTS_KEY
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT, PIXELS, Float32

if TYPE_CHECKING:
    from mnist_batchnorm.parity import runtime

# Largest error of a logit, relative to the row's largest, that another machine's rounding causes.
# Intact files were measured within 1.1e-5 of float64 arithmetic; broken ones are off by 1e-3.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Model:
    """One loaded version of a model; its name and version are those of requests."""

    name: str
    version: str
    sha256: str  # of the file
    unproven: str | None  # why the gate has not passed this file; None: it has
    weights_sha256: str | None  # of the exported checkpoint, by the file's metadata
    run: Callable[[Float32], Float32]  # [n, 784] -> [n, 10]; raises `runtime.RuntimeFailedError`

    @property
    def verified(self) -> bool:
        """Whether the gate has passed this file."""
        return self.unproven is None

    @property
    def identity(self) -> tuple[str, str, str, bool]:
        """What distinguishes the model for clients."""
        return self.name, self.version, self.sha256, self.verified


def load(
    name: str,
    onnx: Path,
    parity: Path,
    version: str | None = None,
    *,
    allow_unverified: bool = False,
) -> Model:
    """Load a file that the gate's report has passed by its hash.

    Args:
        name: served name.
        onnx: the file.
        parity: the gate's report, ``parity.json``.
        version: served version; None: the number in ``models/registry.json`` of a registered file,
            else the start of its hash.
        allow_unverified: load a file that is not proven, too.

    Raises:
        UserError: The file is missing or is not a model with this project's interface.
        CheckFailedError: The file is not proven.
    """
    from mnist_batchnorm.parity import runtime  # starts threads: not in the parent of workers

    content = read_output(onnx, "export")
    digest = sha256(content).hexdigest()
    problem = why_unproven(digest, parity)
    if problem and not allow_unverified:
        raise _refusal(onnx, problem)
    try:
        session = runtime.load(content)
    except runtime.RuntimeFailedError as error:
        raise UserError(f"{onnx} is no ONNX model that runs: {error}") from None
    if (session.input, session.output) != (INPUT, OUTPUT):
        raise UserError(
            f"{onnx} maps {session.input!r} to {session.output!r}, not {INPUT!r} to {OUTPUT!r}"
        )
    try:
        logits = session.run(np.zeros((1, PIXELS), np.float32))
    except runtime.RuntimeFailedError as error:
        raise UserError(f"{onnx} does not run on {INPUT} [1, {PIXELS}]: {error}") from None
    if logits.shape != (1, CLASSES) or logits.dtype != np.float32:
        raise UserError(
            f"{onnx} gives {OUTPUT} {logits.dtype} {list(logits.shape)} for one image, expected "
            f"float32 [1, {CLASSES}]"
        )
    problem = problem or why_not_here(session, digest, parity)
    if problem and not allow_unverified:
        raise _refusal(onnx, problem)
    weights = session.metadata.get(WEIGHTS_KEY)
    version = version or registered_version(digest) or digest[:HASH_DIGITS]
    return Model(name, version, digest, problem, weights, session.run)


def _refusal(onnx: Path, problem: str) -> CheckFailedError:
    return CheckFailedError(
        f"{onnx} is not served: {problem}; run `dvc repro verify`, or take the risk with "
        "--allow-unverified"
    )


def why_not_here(session: "runtime.Session", digest: str, parity: Path) -> str | None:
    """Return why a loaded file does not reproduce its golden outputs here; None: it does.

    Another ONNX Runtime or processor rounds differently; an output that depends on the other rows
    of the batch comes from batch statistics in training mode.
    """
    from mnist_batchnorm.parity import runtime

    report = read_record(parity, Parity, "verify")
    goldens = report.goldens
    names = [name for name in report.files_of(digest) if goldens and name in goldens.logits]
    if not goldens or not goldens.images or not names:
        return f"{parity} holds no golden outputs of it"
    try:
        images = network_input(np.frombuffer(goldens.images, np.uint8).reshape(-1, PIXELS))
        expected = np.array(goldens.logits[names[0]]).reshape(len(images), CLASSES)
    except ValueError:
        return f"{parity} holds golden outputs that are none"
    try:
        logits = session.run(images)
        alone = np.concatenate([session.run(image[np.newaxis]) for image in images])
    except runtime.RuntimeFailedError as error:
        return f"it does not run on the golden images of {parity}: {error}"
    if logits.shape != expected.shape or not np.array_equal(logits, alone):
        return "its output for an image depends on which others come with it"
    change = relative_change(expected, logits)
    if not (change <= TOLERANCE).all() or (logits.argmax(1) != expected.argmax(1)).any():
        return (
            f"on the golden images of {parity} its outputs are off by "
            f"{np.abs(logits - expected).max():.1e}, more than {TOLERANCE:g} of the largest logit"
        )
    return None
