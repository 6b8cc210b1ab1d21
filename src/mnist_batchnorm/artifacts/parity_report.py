"""TODO."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Base64Bytes, Field, model_validator

from mnist_batchnorm.artifacts.reading import Record, read_record
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, MODELS, PARITY, TEST_SPLIT


class Check(Record):
    """One check of the parity gate."""

    name: str
    status: Literal["passed", "failed", "not judged"]
    detail: str


class Diagnosis(Record):
    """A mistake that would explain what the gate found."""

    text: str


class JudgedFile(Record):
    """A file that the gate read, with its hash at that time."""

    path: str
    sha256: str


class JudgedImages(JudgedFile):
    """The split that the gate took its images from, and how many they are."""

    images: int


class Accuracy(Record):
    """Share of right predictions of one file, and of the network that it should be."""

    onnxruntime: float | None
    pytorch: float | None
    float64: float | None


class Histogram(Record):
    """Images by their largest error, in standard deviations of its rounding error.

    Attributes:
        edges: of the bins, ascending; the last is the alarm.
        counts: images in each bin, and last those beyond the alarm.
    """

    edges: list[float]
    counts: list[int]

    @model_validator(mode="after")
    def _one_count_more_than_bins(self) -> Self:
        if not 2 <= len(self.edges) == len(self.counts):
            raise ValueError(f"{len(self.edges)} edges and {len(self.counts)} counts do not fit")
        return self


class ParitySummary(Record):
    """One ONNX file's errors on the images, as docs/parity.md says; None: not measured."""

    max_relative_error: float | None
    worst_sigmas: float | None
    alarm_sigmas: float | None
    tolerance: float | None
    certified: int | None
    argmax_differences: int | None
    undecided: int | None
    accuracy: Accuracy | None
    histogram: Histogram | None


class GraphParity(Record):
    """What the gate found about one ONNX file."""

    onnx: JudgedFile
    weights: JudgedFile
    verdict: Literal["parity", "no parity", "unproven"]
    parity: bool
    summary: ParitySummary
    diagnoses: list[Diagnosis]
    checks: list[Check]

    @property
    def proven(self) -> bool:
        """Whether neither the verdict nor any check speaks against parity."""
        passed = [check.status == "passed" for check in self.checks]
        return self.parity and self.verdict == "parity" and bool(passed) and all(passed)


class Goldens(Record):
    """Images, and what each ONNX file computed from them when it passed.

    Attributes:
        images: uint8 ``[n, 784]`` in Base64.
        labels: ``[n]``, the digits.
        logits: ``[n, 10]`` of each file.
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
        """Whether nothing in the file, on any level, speaks against parity."""
        return self.parity and self.proves(self.graphs)

    def proves(self, files: Iterable[str]) -> bool:
        """Whether nothing in the file speaks against these ONNX files.

        A verdict against the whole speaks against each, unless another file's explains it.
        """
        found = [self.graphs.get(file) for file in files]
        explained = self.parity or not all(graph.proven for graph in self.graphs.values())
        return (
            explained and bool(found) and all(graph is not None and graph.proven for graph in found)
        )


def read_parity() -> Parity:
    """Read the gate's verdict and make sure that it is about the files as they are now.

    Raises:
        UserError: The verdict or a file that it is about is missing, the file has changed, or it
            is none of `GRAPHS`.
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
                f"{PARITY} is about a {file} with SHA-256 {then.sha256[:12]}…, but the file is "
                f"{actual[:12]}…; run `dvc repro verify`"
            )
    return parity
