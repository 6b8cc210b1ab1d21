"""``reports/parity.json``: read in every version, and what it proves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.artifacts.parity_report import (
    Parity,
    error_table,
    goldens_of,
    why_unproven,
)
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.splits import Split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.parity.report import CHECKS, Check, Diagnosis, ParityReport

HASHES = {"bn.onnx": "1" * 64, "bn-folded.onnx": "2" * 64}
PASSED = [Check(name, "passed", "holds", {"numbers": 3}) for name in CHECKS]


def report(name: str = "bn.onnx", *changed: Check) -> ParityReport:
    found = {check.name: check for check in changed}
    checks = [found.get(check.name, check) for check in PASSED]
    diagnoses = [Diagnosis("epsilon", "epsilon differs")] if changed else []
    return ParityReport(
        f"models/{name}", HASHES[name], "models/bn.safetensors", "3" * 64, checks, diagnoses
    )


def content(*changed: Check) -> dict[str, Any]:
    """A report in which ``changed`` are checks of bn.onnx."""
    graphs = {name: report(name, *changed if name == "bn.onnx" else ()) for name in HASHES}
    return {
        "schema": 1,
        "parity": all(graph.parity for graph in graphs.values()),
        "data": {"path": "data/prepared/test.safetensors", "sha256": "4" * 64, "images": 500},
        "versions": {"onnx": "1.23.2"},
        "goldens": {"images": "AAAA", "labels": [1], "logits": {"bn.onnx": [[0.5]]}},
        "graphs": {name: graph.to_json() for name, graph in graphs.items()},
    }


def saved(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "parity.json"
    path.write_text(json.dumps(content))
    return path


def test_the_gates_report_is_read_back(tmp_path: Path) -> None:
    failed = Check("weights", "failed", "a number differs", {"problems": ["a number differs"]})
    parity = read_record(saved(tmp_path, content(failed)), Parity, "verify")
    written = report("bn.onnx", failed)
    graph = parity.graphs["bn.onnx"]
    assert (graph.checks, graph.diagnoses) == (written.checks, written.diagnoses)
    assert graph.summary == written.summary()
    assert parity.goldens is not None
    assert parity.goldens.images == bytes(3)


def test_reports_of_version_0_1_and_newer_ones_are_read(tmp_path: Path) -> None:
    old = content()
    del old["goldens"]
    for graph in old["graphs"].values():
        for check in graph["checks"]:
            del check["evidence"]
    new = content() | {"added": 1}
    new["graphs"]["bn.onnx"]["checks"][0]["added"] = {"more": 1}
    new["graphs"]["bn.onnx"]["summary"]["added"] = 1
    for parity in (old, new):
        assert read_record(saved(tmp_path, parity), Parity, "verify").proven


@pytest.mark.parametrize(
    ("edges", "counts", "problem"),
    [([0.0, 0.5], [1, 2, 3], "2 edges and 3 counts"), ([0.0], [1], "1 edges and 1 counts")],
)
def test_histogram_of_other_lengths_is_an_error(
    tmp_path: Path, edges: list[float], counts: list[int], problem: str
) -> None:
    bad = content()
    bad["graphs"]["bn.onnx"]["summary"]["histogram"] = {"edges": edges, "counts": counts}
    with pytest.raises(UserError, match=rf"summary\.histogram: Value error, {problem} do not fit"):
        read_record(saved(tmp_path, bad), Parity, "verify")


def test_a_failed_file_is_unproven_and_explains_the_failure_of_the_whole(tmp_path: Path) -> None:
    path = saved(tmp_path, content(Check("weights", "failed", "differs")))
    assert why_unproven(HASHES["bn.onnx"], path) == f"{path} says: no parity"
    assert why_unproven(HASHES["bn-folded.onnx"], path) is None
    assert why_unproven("9" * 64, path) == (
        f"{path} is about other files than the one with SHA-256 999999999999…"
    )
    unexplained = content() | {"parity": False}
    path = saved(tmp_path, unexplained)
    assert why_unproven(HASHES["bn-folded.onnx"], path) == f"{path} says: no parity"
    assert "run `dvc repro verify` first" in str(why_unproven("1" * 64, tmp_path / "absent.json"))


def test_goldens_are_the_first_image_of_each_digit_and_restore_float32() -> None:
    images = np.arange(4 * 784, dtype=np.uint8).reshape(4, 28, 28)
    split = Split(images, np.array([3, 1, 3, 0], np.uint8), np.arange(4, dtype=np.int32))

    def run(inputs: np.ndarray) -> np.ndarray:
        return inputs[:, :10] / np.float32(3)

    goldens = goldens_of(split, {"bn.onnx": run})
    assert goldens["labels"] == [0, 1, 3]
    flat = images[[3, 1, 0]].reshape(3, 784)
    np.testing.assert_array_equal(
        np.array(goldens["logits"]["bn.onnx"], np.float32),
        run(flat.astype(np.float32) / np.float32(255)),
    )


def test_error_table_has_a_row_per_image_and_gaps_for_files_without_errors() -> None:
    measured = ParityReport("", "", "", "", [], [], np.array([1e-7, 0.25]))
    unmeasured = ParityReport("", "", "", "", [], [])
    assert error_table({"bn.onnx": measured, "plain.onnx": unmeasured}, 2) == (
        "image,bn.onnx,plain.onnx\n0,1.000e-07,\n1,2.500e-01,\n"
    )
