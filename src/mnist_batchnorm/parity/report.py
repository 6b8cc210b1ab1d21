"""What the gate says: a status, a sentence and numbers a check, and the likely mistake by name."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Status = Literal["passed", "failed", "not judged"]

CHECKS = (  # all of them, in the order of a report
    *("file", "provenance", "structure", "weights", "re-export"),
    *("probes", "invariance", "behaviour"),
)
LARGEST = 1e300  # stands for NaN and infinity, which JSON does not know
SHOWN = 3  # problems in the sentence; all of them are in the evidence
WIDTH = 100  # columns of the table


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: one of `CHECKS`.
        status: whether what it checks holds; ``not judged`` where the gate cannot tell.
        detail: one sentence: what holds, or what differs, where and by how much.
        evidence: JSON-serializable facts, the worst case and its distance from the limit among
            them; of a failed check ``problems``, every one.
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
    """Make a check that passes when there are no problems, and otherwise tells the first ones."""
    if not problems:
        return Check(name, "passed", success, evidence)
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    detail = "; ".join([*problems[:SHOWN], *more])
    return Check(name, "failed", detail, evidence | {"problems": problems})


@dataclass(frozen=True)
class Diagnosis:
    """A mistake that would explain what the checks found.

    Attributes:
        id: its name for programs: ``training-mode``; docs/parity.md lists them.
        text: for people, with the evidence.
    """

    id: str
    text: str


@dataclass(frozen=True)
class ParityReport:
    """What the gate found about one ONNX file.

    Attributes:
        onnx: the file, as the caller named it.
        onnx_sha256: of the bytes that were judged, so that no verdict is used for others.
        weights: the checkpoint, as the caller named it.
        weights_sha256: of its bytes.
        checks: every check, in order.
        diagnoses: what may have gone wrong, the likeliest first; empty when nothing did.
        errors: each real input's largest error over its largest logit, at any optimization
            level, float64 ``[n]``; None when the file does not run or no inputs were given.
    """

    onnx: str
    onnx_sha256: str
    weights: str
    weights_sha256: str
    checks: list[Check]
    diagnoses: list[Diagnosis]
    errors: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> Literal["parity", "no parity", "unproven"]:
        """``unproven`` when nothing failed but a check could not be judged."""
        statuses = {check.status for check in self.checks}
        if "failed" in statuses:
            return "no parity"
        return "unproven" if "not judged" in statuses else "parity"

    @property
    def parity(self) -> bool:
        """Whether every check was judged and passed."""
        return self.verdict == "parity"

    def evidence(self, name: str) -> dict[str, Any]:
        """Return the evidence of a check; empty when it did not come to run."""
        return next((check.evidence for check in self.checks if check.name == name), {})

    def summary(self) -> dict[str, Any]:
        """Return the figures that people compare; None where one could not be measured."""
        probes, behaviour = self.evidence("probes"), self.evidence("behaviour")
        natural = probes.get("families", {}).get(probes.get("natural"), {})
        histogram = probes.get("histogram")
        if histogram is not None:
            edges = [histogram["bin"] * i for i in range(len(histogram["counts"]))]
            histogram = {"edges": edges, "counts": histogram["counts"]}
        return {
            "max_relative_error": natural.get("relative_error"),
            "worst_sigmas": natural.get("sigmas"),
            "alarm_sigmas": probes.get("alarm"),
            "tolerance": probes.get("median_tolerance"),
            "certified": probes.get("certified"),
            "argmax_differences": behaviour.get("differences"),
            "undecided": behaviour.get("undecided"),
            "accuracy": behaviour.get("accuracy"),
            "histogram": histogram,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON holds it; docs/parity.md describes each key."""
        return {
            "onnx": {"path": self.onnx, "sha256": self.onnx_sha256},
            "weights": {"path": self.weights, "sha256": self.weights_sha256},
            "verdict": self.verdict,
            "parity": self.parity,
            "summary": self.summary(),
            "diagnoses": [asdict(diagnosis) for diagnosis in self.diagnoses],
            "checks": [asdict(check) for check in self.checks],
        }

    def table(self) -> str:
        """Return the report for people: the verdict, the likely mistake, a line a check."""
        marks = {"passed": "ok", "failed": "FAILED", "not judged": "not judged"}
        lines = [f"{self.onnx}: {self.verdict.upper() if not self.parity else 'parity'}"]
        lines += [f"  likely: {diagnosis.text}" for diagnosis in self.diagnoses[:SHOWN]]
        for check in self.checks:
            head = f"  {marks[check.status]:<10}  {check.name:<10}  "
            text = [*_wrapped(check.detail, WIDTH - len(head))]
            lines += [head + text[0], *(" " * len(head) + line for line in text[1:])]
        return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


def finite(errors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return errors with NaN, infinity and what is larger replaced by `LARGEST`."""
    return np.fmin(errors, LARGEST)


def one_line(error: Exception) -> str:
    """Return the start of an exception's message without its line breaks."""
    return " ".join(str(error).split())[:300]
