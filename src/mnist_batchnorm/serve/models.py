"""The models that are served: only files that the parity gate has passed, by their hash."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mnist_batchnorm.errors import CheckFailedError, UserError
from mnist_batchnorm.layout import REGISTRY, WEIGHTS_KEY
from mnist_batchnorm.ledger import Ledger
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.results import Parity, read_record
from mnist_batchnorm.serve.protocol import INPUT, OUTPUT, Float32

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
    try:
        content = onnx.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {onnx}; run `dvc repro export` first") from None
    except OSError as error:
        raise UserError(f"{onnx} cannot be read: {error.strerror}") from None
    digest = sha256(content).hexdigest()
    problem = why_unproven(digest, parity)
    if problem and not allow_unverified:
        raise CheckFailedError(
            f"{onnx} is not served: {problem}; run `dvc repro verify`, or take the risk with "
            "--allow-unverified"
        )
    try:
        session = runtime.load(content)
    except runtime.RuntimeFailedError as error:
        raise UserError(f"{onnx} is no ONNX model that runs: {error}") from None
    if (session.input, session.output) != (INPUT, OUTPUT):
        raise UserError(
            f"{onnx} maps {session.input!r} to {session.output!r}, not {INPUT!r} to {OUTPUT!r}"
        )
    weights = session.metadata.get(WEIGHTS_KEY)
    version = version or registered_version(digest) or digest[:SHORT]
    return Model(name, version, digest, problem, weights, session.run)


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
    judged = [graph for graph in report.graphs.values() if graph.onnx.sha256 == digest]
    if not judged:
        return f"{parity} is about other files than the one with SHA-256 {digest[:SHORT]}…"
    if not all(graph.proven for graph in judged):
        return f"{parity} says: no parity"
    return None


def registered_version(digest: str) -> str | None:
    """Return the number under which a file is registered in ``models/registry.json``, if it is."""
    for version in Ledger.load(REGISTRY).versions:
        if digest in {file.sha256 for file in version.files.values()}:
            return str(version.version)
    return None
