"""``reports/parity.json`` and ``reports/parity/errors.csv``: the gate's reports on ONNX files."""

import base64
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Base64Bytes, Field

from mnist_batchnorm.artifacts.reading import Record, read_record
from mnist_batchnorm.artifacts.splits import Split, network_input
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, write_json, write_text
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, MODELS, PARITY, REPORTS, TEST_SPLIT
from mnist_batchnorm.parity.report import Check, Diagnosis, ParityReport, ParitySummary, Verdict

ERRORS = REPORTS / "parity/errors.csv"
HASH_DIGITS = 12  # shown of a SHA-256


class JudgedFile(Record):
    """A file that the gate read, with its hash at that time."""

    path: str
    sha256: str


class JudgedImages(JudgedFile):
    """The split that the gate took its images from, and their number."""

    images: int


class GraphParity(Record):
    """The gate's report on one ONNX file."""

    onnx: JudgedFile
    weights: JudgedFile
    verdict: Verdict
    parity: bool
    summary: ParitySummary
    diagnoses: list[Diagnosis]
    checks: list[Check]

    @property
    def proven(self) -> bool:
        """Whether the verdict and every check confirm parity."""
        passed = [check.status == "passed" for check in self.checks]
        return self.parity and self.verdict == "parity" and bool(passed) and all(passed)


class Goldens(Record):
    """Images, and the outputs that each ONNX file computed from them when it passed.

    Attributes:
        images: uint8 ``[n, 784]`` in Base64.
        labels: digits, ``[n]``.
        logits: float32 ``[n, 10]`` of each file, as the shortest decimals that restore them.
    """

    images: Base64Bytes
    labels: list[int]
    logits: dict[str, list[list[float]]]


class Parity(Record):
    """``reports/parity.json``.

    Attributes:
        goldens: None in reports of version 0.1 and before.
    """

    version: Literal[1] = Field(alias="schema")
    parity: bool
    data: JudgedImages
    versions: dict[str, str]
    goldens: Goldens | None = None
    graphs: dict[str, GraphParity]

    @property
    def proven(self) -> bool:
        """Whether every file in the report is proven."""
        return self.parity and self.proves(self.graphs)

    def proves(self, files: Iterable[str]) -> bool:
        """Whether the report proves these ONNX files.

        A report that fails as a whole proves none, unless another file's failure explains it.
        """
        found = [self.graphs.get(file) for file in files]
        explained = self.parity or not all(graph.proven for graph in self.graphs.values())
        return (
            explained and bool(found) and all(graph is not None and graph.proven for graph in found)
        )

    def files_of(self, sha256: str) -> list[str]:
        """Return the names of the judged ONNX files with this hash."""
        return [name for name, graph in self.graphs.items() if graph.onnx.sha256 == sha256]


def why_unproven(sha256: str, path: Path) -> str | None:
    """Return why the report at ``path`` does not prove the file with this hash; None if it does."""
    try:
        report = read_record(path, Parity, "verify")
    except UserError as error:
        return str(error)
    files = report.files_of(sha256)
    if not files:
        return f"{path} is about other files than the one with SHA-256 {sha256[:HASH_DIGITS]}…"
    return None if report.proves(files) else f"{path} says: no parity"


def read_parity() -> Parity:
    """Read the report and check that the files that it is about are unchanged.

    Raises:
        UserError: The report or a file that it is about is missing, the file has changed, or it
            is not in `GRAPHS`.
    """
    parity = read_record(PARITY, Parity, "verify")
    if unknown := sorted(parity.graphs.keys() - GRAPHS.keys()):
        raise UserError(
            f"{PARITY} is about {', '.join(unknown)}, which stage export does not write; "
            "run `dvc repro verify`"
        )
    judged: list[tuple[Path, str, JudgedFile]] = [(TEST_SPLIT, "prepare", parity.data)]
    for name, graph in parity.graphs.items():
        weights = CHECKPOINTS[GRAPHS[name].variant]
        judged += [(weights, "train", graph.weights), (MODELS / name, "export", graph.onnx)]
    for file, stage, then in judged:
        if not file.is_file():
            raise UserError(f"no {file}; run `dvc repro {stage}` first")
        if (actual := digest(file)) != then.sha256:
            raise UserError(
                f"{PARITY} is about a {file} with SHA-256 {then.sha256[:HASH_DIGITS]}…, but the "
                f"file is {actual[:HASH_DIGITS]}…; run `dvc repro verify`"
            )
    return parity


def goldens_of(split: Split, models: Mapping[str, Callable[[Float32], Any]]) -> dict[str, Any]:
    """Return `Goldens` as JSON content: the split's first image of each digit.

    Args:
        split: real images.
        models: of each file that has passed, its function from images, float32 ``[n, 784]``, to
            logits, float32 ``[n, 10]``.
    """
    _, first = np.unique(split.labels, return_index=True)
    images = split.images[first]
    inputs = network_input(images)
    return {
        "images": base64.b64encode(images.tobytes()).decode(),
        "labels": split.labels[first].tolist(),
        "logits": {
            name: [[float(str(value)) for value in row] for row in run(inputs)]
            for name, run in models.items()
        },
    }


def write_parity(
    reports: Mapping[str, ParityReport], data: JudgedImages, goldens: Mapping[str, Any]
) -> None:
    """Write ``reports/parity.json``, see docs/parity.md, and ``reports/parity/errors.csv``.

    Args:
        reports: the gate's report on each ONNX file by name.
        data: the split that all were judged by.
        goldens: `goldens_of` the files that passed.
    """
    content = {
        "schema": 1,
        "parity": all(report.parity for report in reports.values()),
        "data": data.model_dump(),
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "torch")},
        "goldens": goldens,
        "graphs": {name: report.to_json() for name, report in reports.items()},
    }
    write_json(PARITY, content)
    write_text(ERRORS, error_table(reports, data.images))


def error_table(reports: Mapping[str, ParityReport], images: int) -> str:
    """Return the CSV of each image's largest relative error in each file; empty: not measured."""
    columns = [
        [""] * images if report.errors is None else [f"{error:.3e}" for error in report.errors]
        for report in reports.values()
    ]
    rows = [["image", *reports], *zip(map(str, range(images)), *columns, strict=True)]
    return "\n".join(map(",".join, rows)) + "\n"
