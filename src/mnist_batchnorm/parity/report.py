"""The gate's report: one status with its evidence per check, and the likely mistakes by name.

Free of PyTorch and ONNX, so that readers of ``reports/parity.json`` can import its types.
"""

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from mnist_batchnorm.core.arrays import Float64

Status = Literal["passed", "failed", "not judged"]
Verdict = Literal["parity", "no parity", "unproven"]

CHECKS = (  # in the order of a report
    *("file", "provenance", "structure", "weights", "re-export"),
    *("probes", "invariance", "behaviour"),
)
LARGEST_ERROR = 1e300  # replaces NaN and infinity, which JSON does not have
MAX_SHOWN = 3  # problems in a check's sentence, diagnoses in the table; the JSON has all
TABLE_WIDTH = 100  # characters
MARKS = {"passed": "ok", "failed": "FAILED", "not judged": "not judged"}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: one of `CHECKS`.
        status: ``not judged`` if the gate lacks what it needs to judge.
        detail: one sentence: what holds, or what differs, where and by how much.
        evidence: JSON-serializable numbers, including the worst case and its distance from the
            limit; a failed check lists all its ``problems``.
    """

    name: str
    status: Status
    detail: str
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Everything that a failed check found."""
        found: list[str] = self.evidence.get("problems", [])
        return found


def verdict(name: str, problems: list[str], success: str, evidence: dict[str, Any]) -> Check:
    """Return a check that passes if there are no problems, and otherwise shows the first ones."""
    if not problems:
        return Check(name, "passed", success, evidence)
    more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    detail = "; ".join([*problems[:MAX_SHOWN], *more])
    return Check(name, "failed", detail, evidence | {"problems": problems})


@dataclass(frozen=True)
class Diagnosis:
    """A mistake that would explain the failed checks.

    Attributes:
        id: stable name, such as ``training-mode``; docs/parity.md lists them.
        text: explanation with the evidence.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Accuracy:
    """Share of correct predictions; None without labels."""

    onnxruntime: float | None
    pytorch: float | None
    float64: float | None


@dataclass(frozen=True)
class Histogram:
    """Inputs by their largest error, in standard deviations of float32 rounding.

    Attributes:
        edges: bin edges, ascending; the last is the alarm.
        counts: inputs per bin, followed by the inputs beyond the alarm.

    Raises:
        ValueError: The lengths do not fit.
    """

    edges: list[float]
    counts: list[int]

    def __post_init__(self) -> None:
        if not 2 <= len(self.edges) == len(self.counts):
            raise ValueError(f"{len(self.edges)} edges and {len(self.counts)} counts do not fit")


@dataclass(frozen=True)
class ParitySummary:
    """Key figures of one ONNX file, see docs/parity.md; None: not measured."""

    max_relative_error: float | None
    worst_sigmas: float | None
    alarm_sigmas: float | None
    tolerance: float | None
    certified: int | None
    argmax_differences: int | None
    undecided: int | None
    accuracy: Accuracy | None
    histogram: Histogram | None


@dataclass(frozen=True)
class ParityReport:
    """The gate's report on one ONNX file.

    Attributes:
        onnx: the file's path, as given.
        onnx_sha256: hash of the judged bytes.
        weights: the checkpoint's path, as given.
        weights_sha256: hash of the checkpoint's bytes that the file was judged by.
        checks: every check, in the order of `CHECKS`.
        diagnoses: likely mistakes, the likeliest first; empty if no check failed.
        errors: largest error of each real input over all optimization levels, relative to the
            row's largest logit, float64 ``[n]``; None if the file does not run or no inputs were
            given.
    """

    onnx: str
    onnx_sha256: str
    weights: str
    weights_sha256: str
    checks: list[Check]
    diagnoses: list[Diagnosis]
    errors: Float64 | None = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> Verdict:
        """``unproven`` if no check failed but one could not be judged."""
        statuses = {check.status for check in self.checks}
        if "failed" in statuses:
            return "no parity"
        return "unproven" if "not judged" in statuses else "parity"

    @property
    def parity(self) -> bool:
        """Whether every check was judged and passed."""
        return self.verdict == "parity"

    def evidence(self, name: str) -> dict[str, Any]:
        """Return the evidence of a check; empty if it did not run."""
        return next((check.evidence for check in self.checks if check.name == name), {})

    def summary(self) -> ParitySummary:
        """Return the key figures."""
        probes, behavior = self.evidence("probes"), self.evidence("behaviour")
        natural = probes.get("families", {}).get(probes.get("natural"), {})
        accuracy, histogram = behavior.get("accuracy"), probes.get("histogram")
        return ParitySummary(
            max_relative_error=natural.get("relative_error"),
            worst_sigmas=natural.get("sigmas"),
            alarm_sigmas=probes.get("alarm"),
            tolerance=probes.get("median_tolerance"),
            certified=probes.get("certified"),
            argmax_differences=behavior.get("differences"),
            undecided=behavior.get("undecided"),
            accuracy=accuracy and Accuracy(**accuracy),
            histogram=histogram
            and Histogram(
                [histogram["bin"] * i for i in range(len(histogram["counts"]))],
                histogram["counts"],
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON content; docs/parity.md describes the keys."""
        return {
            "onnx": {"path": self.onnx, "sha256": self.onnx_sha256},
            "weights": {"path": self.weights, "sha256": self.weights_sha256},
            "verdict": self.verdict,
            "parity": self.parity,
            "summary": asdict(self.summary()),
            "diagnoses": [asdict(diagnosis) for diagnosis in self.diagnoses],
            "checks": [asdict(check) for check in self.checks],
        }

    def table(self) -> str:
        """Return the report as text: the verdict, likely mistakes, and one row per check."""
        lines = [f"{self.onnx}: {self.verdict if self.parity else self.verdict.upper()}"]
        lines += [f"  likely: {diagnosis.text}" for diagnosis in self.diagnoses[:MAX_SHOWN]]
        for check in self.checks:
            head = f"  {MARKS[check.status]:<10}  {check.name:<10}  "
            lines += textwrap.wrap(
                check.detail, TABLE_WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
            ) or [head]
        return "\n".join(lines)


def finite(errors: Float64) -> Float64:
    """Return errors with NaN and everything larger replaced by `LARGEST_ERROR`."""
    return np.fmin(errors, LARGEST_ERROR)


def one_line(error: Exception) -> str:
    """Return the start of an exception's message without line breaks."""
    return " ".join(str(error).split())[:300]
