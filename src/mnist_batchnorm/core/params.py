"""``params.yaml`` as typed, frozen objects: every impossible value is an error that names it."""

import io
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import PARAMS_FILE

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # every library accepts such a size
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$")]


class Section(BaseModel):
    """A part of ``params.yaml``: unknown keys and lossy conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileHashes(Section):
    """SHA-256 of each uncompressed IDX file."""

    train_images: Annotated[Sha256, Field(alias="train-images")]
    train_labels: Annotated[Sha256, Field(alias="train-labels")]
    t10k_images: Annotated[Sha256, Field(alias="t10k-images")]
    t10k_labels: Annotated[Sha256, Field(alias="t10k-labels")]

    def by_file(self) -> dict[str, str]:
        """Map each file's canonical stem (``train-images`` …) to its hash."""
        return self.model_dump(by_alias=True)


class DownloadParams(Section):
    """The data set."""

    sha256: FileHashes


class PrepareParams(Section):
    """The split of the training images."""

    valid_size: Annotated[int, Field(ge=0)]
    seed: Seed


class TrainParams(Section):
    """The network, the optimizer and the number of epochs."""

    seed: Seed
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)]
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]  # batch norm needs a variance
    lr: Annotated[float, Field(gt=0)]
    bn_momentum: Annotated[float, Field(gt=0, le=1)]
    bn_eps: Annotated[float, Field(gt=0)]
    device: Device
    portable: bool

    @model_validator(mode="after")
    def _require_cpu_if_portable(self) -> "TrainParams":
        if self.portable and self.device.startswith("cuda"):
            raise ValueError("portable is for the CPU; with it, device must be cpu or auto")
        return self


class SeedsParams(Section):
    """The number of runs of stage seeds."""

    count: Annotated[int, Field(ge=2, le=10_000)]


class EvaluateParams(Section):
    """The evaluation on the test images."""

    batch_size: PositiveInt
    calibration_bins: Annotated[int, Field(gt=0, le=10_000)]  # a bin for each test image


class ExportParams(Section):
    """The ONNX files."""

    opset: Annotated[int, Field(ge=18, le=23)]


class RegisterParams(Section):
    """The requirements for a new champion."""

    min_accuracy: Annotated[float, Field(ge=0, le=1)]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    signed_by: Annotated[str, StringConstraints(min_length=1)] | None


class SyncParams(Section):
    """The experiment in MLflow."""

    experiment: Annotated[str, StringConstraints(min_length=1)]


class Params(Section):
    """``params.yaml``: one section per stage that has parameters."""

    download: DownloadParams
    prepare: PrepareParams
    train: TrainParams
    seeds: SeedsParams
    evaluate: EvaluateParams
    export: ExportParams
    # `register` is an attribute of pydantic models
    registration: Annotated[RegisterParams, Field(alias="register")]
    sync: SyncParams


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Parse and check the parameter file; the UserError names every unusable key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"no {path} in {Path.cwd()}; run this in the folder that holds dvc.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse_params(text, path)


def parse_params(text: str, path: Path = PARAMS_FILE) -> Params:
    """Parse and check the text of a parameter file; see `load_params`."""
    try:
        content = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except Exception as error:  # noqa: BLE001 - "!!bool x" is a KeyError to ruamel, "[[[…" too deep
        raise UserError(f"{path} is not valid YAML: {type(error).__name__}: {error}") from None
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = "".join(f"\n  {_explain(problem)}" for problem in error.errors())
        raise UserError(f"{path} is not usable:{problems}") from None


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    match problem["type"]:
        case "missing":
            return f"{key}: missing"
        case "extra_forbidden":
            return f"{key}: unknown key; remove it or correct its name"
        case "model_type":
            wrong = "must be a section of keys"
        case "tuple_type":
            wrong = "must be a list"
        case "too_short":
            wrong = "needs at least one usable value"
        case _:
            wrong = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {wrong} (got {problem['input']!r})"
