"""The models that may be packaged: files that the parity gate has passed, read once."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.goldens import load_fixture
from mnist_batchnorm.artifacts.parity_report import Parity
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.splits import Split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS, PARITY, REGISTERED, REGISTRY, SERVED, WEIGHTS_KEY
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.models import SHORT, registered_version, why_not_here, why_unproven

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProvenModel:
    """A model, as the bytes that the gate passed.

    Attributes:
        name: that clients call it by.
        path: the file.
        content: its bytes.
        number: of its version in ``models/registry.json``; None where it is not registered.
    """

    name: str
    path: Path
    content: bytes
    number: str | None

    @cached_property
    def sha256(self) -> str:
        """Of the bytes."""
        return sha256(self.content).hexdigest()

    @property
    def version(self) -> str:
        """What `mnist-bn serve` calls it: the registered number, else the hash's beginning."""
        return self.number or self.sha256[:SHORT]

    @cached_property
    def session(self) -> runtime.Session:
        """The model in ONNX Runtime, with one thread."""
        return runtime.load(self.content)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of its origin, its ``metadata_props``, sorted."""
        return dict(sorted(self.session.metadata.items()))

    @property
    def weights_sha256(self) -> str | None:
        """Of the checkpoint that the file says it was made from, if it does."""
        return self.session.metadata.get(WEIGHTS_KEY)


@dataclass(frozen=True)
class Proven:
    """All that a package is made from.

    Attributes:
        models: the models, in the order of `SERVED`.
        evidence: the bytes of ``reports/parity.json`` and ``models/registry.json`` by path.
        versions: of the packages that the gate proved the models with.
        split: the real images of the regression tests.
    """

    models: tuple[ProvenModel, ...]
    evidence: Mapping[Path, bytes]
    versions: Mapping[str, str]
    split: Split

    @property
    def images(self) -> Float32:
        """The real images as the networks take them, float32 ``[n, 784]``."""
        return network_input(self.split.images)

    def require_unchanged(self) -> None:
        """Make sure that the files on disk still are what was read.

        Raises:
            CheckFailedError: One has been changed or deleted.
        """
        held = {**{model.path: model.content for model in self.models}, **self.evidence}
        for path, content in held.items():
            if not path.is_file() or path.read_bytes() != content:
                raise CheckFailedError(
                    f"nothing is packaged: {path} was changed meanwhile; run `dvc repro verify`, "
                    "then this again"
                )


def read_proven() -> Proven:
    """Read the models in the current folder and the evidence for them.

    The two batch-norm graphs must be there; the plain network is taken where its file is.

    Raises:
        UserError: A file is missing or cannot be read.
        CheckFailedError: The gate has not passed one of these very files, or it computes something
            else here than it did then.
    """
    split, _ = load_fixture()
    contents = {
        name: _read(MODELS / file)
        for name, file in SERVED.items()
        if name in REGISTERED or (MODELS / file).exists()
    }
    evidence = {path: _read(path) for path in (PARITY, REGISTRY) if path.exists()}
    models = tuple(
        ProvenModel(
            name, MODELS / SERVED[name], content, registered_version(sha256(content).hexdigest())
        )
        for name, content in contents.items()
    )
    for model in models:
        problem = why_unproven(model.sha256, PARITY) or _why_not_here(model)
        if problem:
            raise CheckFailedError(
                f"{model.path} is not packaged: {problem}; run `dvc repro verify`"
            )
    proven = Proven(models, evidence, read_record(PARITY, Parity, "verify").versions, split)
    proven.require_unchanged()
    return proven


def _why_not_here(model: ProvenModel) -> str | None:
    try:
        session = model.session
    except runtime.RuntimeFailedError as error:
        return f"it is proven, but does not load here: {error}"
    return why_not_here(session, model.sha256, PARITY)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro export` first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
