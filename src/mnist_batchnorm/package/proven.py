"""The models that may be packaged: files that the parity gate has passed, read once."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.goldens import read_golden_images
from mnist_batchnorm.artifacts.parity_report import HASH_DIGITS, Parity, why_unproven
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.registry_file import registered_version
from mnist_batchnorm.artifacts.splits import Split, network_input
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import read_output
from mnist_batchnorm.core.paths import MODELS, PARITY, REGISTERED, REGISTRY, SERVED, WEIGHTS_KEY
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.models import why_not_here

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProvenModel:
    """An ONNX file that the gate has passed; ``number`` is None if it is not registered."""

    name: str
    path: Path
    content: bytes
    number: str | None

    @cached_property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def version(self) -> str:
        """What `mnist-bn serve` calls it: the registered number, else the hash's beginning."""
        return self.number or self.sha256[:HASH_DIGITS]

    @cached_property
    def session(self) -> runtime.Session:
        return runtime.load(self.content)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's ``metadata_props``, sorted."""
        return dict(sorted(self.session.metadata.items()))

    @property
    def weights_sha256(self) -> str | None:
        # of the checkpoint, if the file names it
        return self.session.metadata.get(WEIGHTS_KEY)


@dataclass(frozen=True)
class Proven:
    """The inputs of a package."""

    models: tuple[ProvenModel, ...]  # in the order of `SERVED`
    evidence: Mapping[Path, bytes]  # reports/parity.json and models/registry.json
    versions: Mapping[str, str]  # of the packages that the gate ran with
    split: Split  # the images of the golden outputs

    @property
    def images(self) -> Float32:
        """The images as network input, float32 ``[n, 784]``."""
        return network_input(self.split.images)

    @property
    def files(self) -> dict[Path, bytes]:
        """The models' and the evidence's bytes by path."""
        return {model.path: model.content for model in self.models} | dict(self.evidence)

    def require_unchanged(self) -> None:
        """Check that no file has been changed or deleted since it was read.

        Raises:
            CheckFailedError: One has.
        """
        for path, content in self.files.items():
            if not path.is_file() or path.read_bytes() != content:
                raise CheckFailedError(
                    f"nothing is packaged: {path} was changed meanwhile; run `dvc repro verify`, "
                    "then this again"
                )


def read_proven() -> Proven:
    """Read the models of the current folder, plain.onnx only if it exists, and their evidence.

    Raises:
        UserError: A file is missing or cannot be read.
        CheckFailedError: The gate has not passed one of the files, or ONNX Runtime gives other
            results here than it gave the gate.
    """
    split, _ = read_golden_images()
    contents = {
        name: read_output(MODELS / file, "export")
        for name, file in SERVED.items()
        if name in REGISTERED or (MODELS / file).exists()
    }
    evidence = {path: read_output(path, "export") for path in (PARITY, REGISTRY) if path.exists()}
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
