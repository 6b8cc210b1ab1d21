"""The models that are served: only files that the parity gate has passed, by their hash."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnist_batchnorm.artifacts.parity_report import Parity
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.artifacts.splits import CLASSES, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import REGISTRY, WEIGHTS_KEY
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT, PIXELS, Float32

if TYPE_CHECKING:
    from mnist_batchnorm.parity import runtime

# Largest change of a logit over the row's largest that may be another machine's rounding: honest
# files were measured within 1.1e-5 of float64 arithmetic; what is broken is off by a thousandth.
TOLERANCE = 1e-4
SHORT = 12  # hex digits of a hash that tell one file from the others


@dataclass(frozen=True)
class Model:
    """One version of a model, loaded.

    Attributes:
        name: that clients call it by.
        version: likewise.
        sha256: of the file.
        unproven: why the gate does not stand behind these very bytes; None: it does.
        weights_sha256: of the checkpoint that the file says it was made from.
        run: float32 ``[n, 784]`` to float32 ``[n, 10]``; raises `runtime.RuntimeFailedError`.
    """

    name: str
    version: str
    sha256: str
    unproven: str | None
    weights_sha256: str | None
    run: Callable[[Float32], Float32]

    @property
    def verified(self) -> bool:
        """Whether the gate has passed these very bytes."""
        return self.unproven is None

    @property
    def identity(self) -> tuple[str, str, str, bool]:
        """What tells it from others for whoever is served."""
        return self.name, self.version, self.sha256, self.verified


def load(
    name: str,
    onnx: Path,
    parity: Path,
    version: str | None = None,
    *,
    allow_unverified: bool = False,
) -> Model:
    """Load a file, if the gate's report is about these very bytes and passed them.

    Args:
        name: to serve it as.
        onnx: the file.
        parity: the gate's report, ``parity.json``.
        version: to serve it as; None: its number in ``models/registry.json`` where it is registered
            there, else the head of its hash.
        allow_unverified: load it all the same.

    Raises:
        UserError: The file is missing or is not a model with this project's interface.
        CheckFailedError: It is not proven.
    """
    from mnist_batchnorm.parity import runtime  # which starts threads: not in a parent of workers

    try:
        content = onnx.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {onnx}; run `dvc repro export` first") from None
    except OSError as error:
        raise UserError(f"{onnx} cannot be read: {error.strerror}") from None
    digest = sha256(content).hexdigest()
    problem = why_unproven(digest, parity)
    if problem and not allow_unverified:
        raise not_served(onnx, problem)
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
        raise not_served(onnx, problem)
    weights = session.metadata.get(WEIGHTS_KEY)
    version = version or registered_version(digest) or digest[:SHORT]
    return Model(name, version, digest, problem, weights, session.run)


def not_served(onnx: Path, problem: str) -> CheckFailedError:
    """Return the refusal of a file."""
    return CheckFailedError(
        f"{onnx} is not served: {problem}; run `dvc repro verify`, or take the risk with "
        "--allow-unverified"
    )


def why_unproven(digest: str, parity: Path) -> str | None:
    """Say why the gate's report does not prove a file; None if it does.

    Args:
        digest: SHA-256 of the file.
        parity: the report.
    """
    try:
        report = read_record(parity, Parity, "verify")
    except UserError as error:
        return str(error)
    judged = files_of(digest, report)
    if not judged:
        return f"{parity} is about other files than the one with SHA-256 {digest[:SHORT]}…"
    if not report.proves(judged):
        return f"{parity} says: no parity"
    return None


def why_not_here(session: "runtime.Session", digest: str, parity: Path) -> str | None:
    """Say why a proven file does not compute here what it computed when it was proven.

    Another ONNX Runtime or processor rounds differently; and what depends on a row's neighbours has
    its statistics in training mode.

    Args:
        session: the file, loaded.
        digest: its SHA-256.
        parity: the gate's report, which holds golden images and outputs.
    """
    from mnist_batchnorm.parity import runtime

    report = read_record(parity, Parity, "verify")
    goldens = report.goldens
    names = [name for name in files_of(digest, report) if goldens and name in goldens.logits]
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
    off = np.abs(logits - expected).max(axis=1)
    largest = np.abs(expected).max(axis=1)
    if not (off <= TOLERANCE * largest).all() or (logits.argmax(1) != expected.argmax(1)).any():
        return (
            f"on the golden images of {parity} its outputs are off by {np.max(off):.1e}, more than "
            f"{TOLERANCE:g} of the largest logit"
        )
    return None


def files_of(digest: str, report: Parity) -> list[str]:
    """Return the names under which a report judges a file with this SHA-256."""
    return [name for name, graph in report.graphs.items() if graph.onnx.sha256 == digest]


def registered_version(digest: str) -> str | None:
    """Return the number under which a file is registered in ``models/registry.json``, if it is."""
    for version in Ledger.load(REGISTRY).versions:
        if digest in {file.sha256 for file in version.files.values()}:
            return str(version.version)
    return None
