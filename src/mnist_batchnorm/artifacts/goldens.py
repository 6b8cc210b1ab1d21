"""Pinned outputs of the exported networks on fixed images: the files in ``goldens/``.

They are in git and are not outputs of the pipeline: only ``mnist-bn regress --update`` writes them,
and ``git diff`` then shows what was accepted. The gate's golden outputs are part of its report
(`artifacts.parity_report`).
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from mnist_batchnorm.artifacts.reading import StrictRecord, first_problem
from mnist_batchnorm.artifacts.registry_file import Sha256
from mnist_batchnorm.artifacts.splits import CLASSES, Split, load_split
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, write_text

GOLDEN_FOLDER = Path("goldens")
GOLDEN_IMAGES = GOLDEN_FOLDER / "images.safetensors"
GOLDEN_FILES = {variant: GOLDEN_FOLDER / f"{variant}.json" for variant in ("bn", "plain")}

FLOAT32_MAX = float(str(np.finfo(np.float32).max))  # as the shortest decimal, which is larger
Logit = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
UPDATE = "`mnist-bn regress --update`"


class PinnedImage(StrictRecord):
    """The pinned logits of one image, with its label and position in MNIST's test file."""

    index: int
    label: int
    logits: Annotated[tuple[Logit, ...], Field(min_length=CLASSES, max_length=CLASSES)]


class PinnedOutputs(StrictRecord):
    """The pinned outputs of one network.

    Attributes:
        computed_by: the software that computed the logits.
        weights_sha256: of the checkpoint; None if the ONNX file does not record it.
        onnx_sha256: of each ONNX file that was pinned, by its name.
        images_sha256: of `GOLDEN_IMAGES`.
        images: in the order of that file.
    """

    computed_by: str
    weights_sha256: Sha256 | None
    onnx_sha256: dict[str, Sha256]
    images_sha256: Sha256
    images: tuple[PinnedImage, ...]

    @property
    def logits(self) -> Float32:
        """The pinned logits, ``[n, 10]``."""
        return np.array([image.logits for image in self.images], dtype=np.float32)


def pinned_images(split: Split, logits: Float32) -> tuple[PinnedImage, ...]:
    """Combine images and logits ``[n, 10]``, as the shortest decimals that restore the float32."""
    return tuple(
        PinnedImage(index=int(index), label=int(label), logits=tuple(float(str(x)) for x in row))
        for index, label, row in zip(split.index, split.labels, logits, strict=True)
    )


def write_pinned_outputs(path: Path, pinned: PinnedOutputs) -> None:
    """Write pinned outputs atomically, one image per line, so that a diff shows changed images.

    Raises:
        UserError: The file cannot be written.
    """
    head = json.dumps(pinned.model_dump(exclude={"images"}), indent=2).removesuffix("\n}")
    rows = ",\n".join(f"    {json.dumps(image.model_dump())}" for image in pinned.images)
    try:
        write_text(path, f'{head},\n  "images": [\n{rows}\n  ]\n}}\n')
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_pinned_outputs(path: Path, split: Split, images_sha256: str) -> PinnedOutputs:
    """Read the pinned outputs for the golden images.

    Raises:
        UserError: The file is missing, unreadable or malformed, or is about other images.
    """
    try:
        pinned = PinnedOutputs.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no {path}: no outputs have been pinned yet; {UPDATE} pins those of the present models"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(
            f"{path} holds no goldens: {first_problem(error)}; restore it with git, or pin the "
            f"present outputs with {UPDATE}"
        ) from None
    indices = [image.index for image in pinned.images]
    if pinned.images_sha256 != images_sha256 or indices != list(split.index):
        raise UserError(
            f"{path} belongs to other images than the fixture's; restore both with git, or pin "
            f"the present outputs with {UPDATE}"
        )
    return pinned


def read_golden_images() -> tuple[Split, str]:
    """Read the golden images, and the SHA-256 of their file.

    Raises:
        UserError: The file is missing or malformed.
    """
    if not GOLDEN_IMAGES.exists():
        raise UserError(
            f"no {GOLDEN_IMAGES} in {Path.cwd()}; run this in the folder that holds dvc.yaml"
        )
    return load_split(GOLDEN_IMAGES), digest(GOLDEN_IMAGES)
