"""TODO."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mnist_batchnorm.artifacts.splits import CLASSES, Split, load_split
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, write_text

FIXTURES = Path("goldens")

IMAGES = FIXTURES / "images.safetensors"

GOLDENS = FIXTURES / "bn.json"  # of the network that is registered

PINNED = {"bn": GOLDENS, "plain": FIXTURES / "plain.json"}  # by variant

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

FLOAT32_MAX = float(str(np.finfo(np.float32).max))  # as the goldens write it

Logit = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]


class GoldenImage(BaseModel):
    """One image's golden logits, with what a reader of the file needs to find the image."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int
    label: int
    logits: Annotated[tuple[Logit, ...], Field(min_length=CLASSES, max_length=CLASSES)]


class Goldens(BaseModel):
    """Golden logits and what they were computed from.

    Attributes:
        computed_by: the arithmetic behind the logits, for people.
        weights_sha256: of the checkpoint; None when the ONNX file does not say.
        onnx_sha256: of each ONNX file that was pinned.
        images_sha256: of the fixture.
        images: in the fixture's order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    computed_by: str
    weights_sha256: Sha256 | None
    onnx_sha256: dict[str, Sha256]
    images_sha256: Sha256
    images: tuple[GoldenImage, ...]

    @property
    def logits(self) -> Float32:
        """The golden logits, float32 ``[n, 10]``."""
        return np.array([image.logits for image in self.images], dtype=np.float32)


def golden_images(split: Split, logits: Float32) -> tuple[GoldenImage, ...]:
    """Pair each image with its logits, as the shortest decimals that restore the float32."""
    return tuple(
        GoldenImage(index=int(index), label=int(label), logits=tuple(float(str(x)) for x in row))
        for index, label, row in zip(split.index, split.labels, logits, strict=True)
    )


def save_goldens(path: Path, goldens: Goldens) -> None:
    """Write goldens as JSON, one image a line, so that a diff shows which images changed.

    Raises:
        UserError: The file cannot be written; what was there before still is.
    """
    head = json.dumps(goldens.model_dump(exclude={"images"}), indent=2).removesuffix("\n}")
    rows = ",\n".join(f"    {json.dumps(image.model_dump())}" for image in goldens.images)
    try:
        write_text(path, f'{head},\n  "images": [\n{rows}\n  ]\n}}\n')
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load_goldens(path: Path, split: Split, images_sha256: str) -> Goldens:
    """Read the goldens of a fixture.

    Raises:
        UserError: The file is missing or unreadable, holds no goldens, or those of other images.
    """
    try:
        goldens = Goldens.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no {path}: no outputs have been pinned yet; `mnist-bn regress --update` pins "
            "those of the present models"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise UserError(
            f"{path} holds no goldens: {where}: {problem['msg']}; restore it with git, or pin the "
            "present outputs with `mnist-bn regress --update`"
        ) from None
    if goldens.images_sha256 != images_sha256 or [image.index for image in goldens.images] != list(
        split.index
    ):
        raise UserError(
            f"{path} belongs to other images than the fixture's; restore both with git, or pin "
            "the present outputs with `mnist-bn regress --update`"
        )
    return goldens


def load_fixture() -> tuple[Split, str]:
    """Read the images of the fixture, and the SHA-256 of their file.

    Raises:
        UserError: The file is missing or does not hold images.
    """
    if not IMAGES.exists():
        raise UserError(f"no {IMAGES} in {Path.cwd()}; run this in the folder that holds dvc.yaml")
    return load_split(IMAGES), digest(IMAGES)
