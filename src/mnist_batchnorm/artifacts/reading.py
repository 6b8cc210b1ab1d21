"""TODO."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from mnist_batchnorm.core.errors import UserError

Floats = npt.NDArray[np.float64]


class Record(BaseModel):
    """What the report reads of a JSON file; it may hold more."""

    model_config = ConfigDict(frozen=True)


RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT], stage: str) -> RecordT:
    """Read the JSON file that a stage wrote.

    Raises:
        UserError: The file is missing or does not hold what that stage writes.
    """
    try:
        return kind.model_validate_json(_read(path, stage))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{path} is not what `dvc repro {stage}` writes: {where}: {first['msg']}"
        ) from None


def read_table(
    path: Path,
    columns: tuple[str, ...],
    stage: str,
    gaps: tuple[str, ...] = (),
    words: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Floats]:
    """Read the CSV of numbers that a stage wrote.

    Args:
        path: where.
        columns: its header.
        stage: who wrote it.
        gaps: columns that may have empty cells.
        words: columns of words, and which; each counts as its place among them.

    Returns:
        float64 ``[rows]``, at least one row, for each column; NaN for an empty cell.

    Raises:
        UserError: The file is missing, has other columns, no rows or something not a number.
    """
    header, _, body = _read(path, stage).partition("\n")
    try:
        if header.split(",") != list(columns):
            raise ValueError(f"its columns are {header!r}, not {','.join(columns)!r}")
        if not body.strip():
            raise ValueError("it has no rows")
        table = np.loadtxt(
            io.StringIO(body),
            delimiter=",",
            comments=None,
            ndmin=2,
            converters={
                **{columns.index(name): _number_or_nan for name in gaps},
                **{columns.index(name): _place_among(of) for name, of in words.items()},
            },
        )
        if (
            table.shape[1] != len(columns)
            or not (np.isfinite(table) | (np.isnan(table) & np.isin(columns, gaps))).all()
        ):
            raise ValueError(f"a row does not hold {len(columns)} finite numbers")
    except ValueError as error:
        raise UserError(f"{path} is not what `dvc repro {stage}` writes: {error}") from None
    return dict(zip(columns, table.T, strict=True))


def _number_or_nan(cell: str) -> float:
    return float(cell) if cell else math.nan


def _place_among(words: tuple[str, ...]) -> Callable[[str], float]:
    return lambda cell: float(words.index(cell))


def _read(path: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro {stage}` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
