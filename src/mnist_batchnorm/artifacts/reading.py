"""Reading the JSON and CSV files of the stages, with errors that name the stage to run again."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_json


class Record(BaseModel):
    """The schema of a JSON file; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)

    def write(self, path: Path) -> None:
        """Write the record as JSON, keys in the order of the fields."""
        write_json(path, self.model_dump(mode="json"))


class StrictRecord(BaseModel):
    """The schema of a JSON file in git: unknown keys and conversions of types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT], stage: str) -> RecordT:
    """Read a JSON file that a stage wrote.

    Raises:
        UserError: The file is missing or does not fit the schema.
    """
    try:
        return kind.model_validate_json(_read(path, stage))
    except ValidationError as error:
        raise UserError(
            f"{path} is not what `dvc repro {stage}` writes: {first_problem(error)}"
        ) from None


def first_problem(error: ValidationError) -> str:
    """Return where a file first violates its schema, and how: ``key.0.key: message``."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{where}: {problem['msg']}"


def read_table(
    path: Path,
    columns: tuple[str, ...],
    stage: str,
    optional: tuple[str, ...] = (),
    categories: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Float64]:
    """Read a CSV of numbers that a stage wrote: float64 ``[rows]`` for each column.

    An empty cell of an ``optional`` column is NaN; ``categories`` are the possible words of columns
    of words, where a word is read as its index.

    Raises:
        UserError: The file is missing, has other columns or no rows, or a cell is not a number.
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
                **{columns.index(name): _number_or_nan for name in optional},
                **{columns.index(name): _index_in(words) for name, words in categories.items()},
            },
        )
        if (
            table.shape[1] != len(columns)
            or not (np.isfinite(table) | (np.isnan(table) & np.isin(columns, optional))).all()
        ):
            raise ValueError(f"a row does not hold {len(columns)} finite numbers")
    except ValueError as error:
        raise UserError(f"{path} is not what `dvc repro {stage}` writes: {error}") from None
    return dict(zip(columns, table.T, strict=True))


def _number_or_nan(cell: str) -> float:
    return float(cell) if cell else math.nan


def _index_in(words: tuple[str, ...]) -> Callable[[str], float]:
    return lambda cell: float(words.index(cell))


def _read(path: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro {stage}` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
