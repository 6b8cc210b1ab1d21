import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.artifacts.parity_report import Parity
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.splits import load_split, save_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.reporting.results import read_results
from tests.support.finished import MEASURED

MADE_BY = {
    "params.yaml": "dvc.yaml",  # not made by a stage: the message says where to run the command
    "data/prepared/test.safetensors": "prepare",
    "models/bn.safetensors": "train",
    "models/bn.onnx": "export",
    "models/bn-folded.onnx": "export",
    "models/plain.safetensors": "train",
    "models/plain.onnx": "export",
    "reports/parity.json": "verify",
    "reports/metrics/data.json": "prepare",
    "reports/metrics/train-plain.json": "train",
    "reports/metrics/test-bn.json": "evaluate",
    "reports/metrics/seeds.json": "seeds",
    "reports/curves/seeds.csv": "seeds",
    "reports/curves/bn.csv": "train",
    "reports/confusion/plain.csv": "evaluate",
    "reports/predictions/bn.csv": "evaluate",
}


@pytest.mark.usefixtures("finished")
def test_reads_what_the_stages_write() -> None:
    found = read_results()
    assert found.parity.proven
    assert found.split_labels == {"train": "train", "valid": "valid"}
    assert [file.name for file in found.files] == [
        "models/bn.safetensors",
        "models/plain.safetensors",
        "models/bn.onnx",
        "models/bn-folded.onnx",
        "models/plain.onnx",
    ]
    for network in found.networks.values():
        right = network.predicted == found.test.labels
        assert right.mean() == network.test.accuracy
        assert np.trace(network.confusion) == right.sum()
        assert network.confusion.sum() == len(found.test)
        assert network.per_class_accuracy == {
            digit: right[found.test.labels == digit].mean() for digit in range(10)
        }
        assert network.curve["epoch"].tolist() == [1, 2, 3]
    assert found.seeds.metrics.difference.values == pytest.approx([0.015, 0.0148])
    assert found.seeds.epoch.tolist() == [1, 2, 3]
    for variant, seed_curves in found.seeds.curves.items():
        gain = 0.015 if variant == "bn" else 0
        expected = [[0.95 + gain + 0.001 * s - 0.01 / e for e in (1, 2, 3)] for s in (0, 1)]
        assert seed_curves["valid_accuracy"] == pytest.approx(np.array(expected))
        assert seed_curves["valid_loss"].shape == (2, 3)
    assert list(found.layers) == ["bn1", "bn2"]
    assert found.layers["bn1"].mean.shape == (32,)
    assert (found.layers["bn1"].deviation > 0).all()


@pytest.mark.parametrize(("path", "hint"), MADE_BY.items())
def test_missing_input_names_file_and_remedy(finished: Path, path: str, hint: str) -> None:
    (finished / path).unlink()
    with pytest.raises(UserError, match=f"no {path}.*{hint}"):
        read_results()


@pytest.mark.parametrize("path", [p for p in MADE_BY if p.startswith("models/")])
def test_verdict_about_other_bytes_is_refused(finished: Path, path: str) -> None:
    content = (finished / path).read_bytes()
    (finished / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"parity\.json is about a {path}.*dvc repro verify"):
        read_results()


@pytest.mark.parametrize("name", GRAPHS)
def test_verdict_that_leaves_a_file_out_is_refused(finished: Path, name: str) -> None:
    path = finished / "reports/parity.json"
    content = json.loads(path.read_text())
    del content["graphs"][name]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"says nothing about {name}; run `dvc repro verify`"):
        read_results()


def test_verdict_about_an_unknown_file_is_refused(finished: Path) -> None:
    path = finished / "reports/parity.json"
    content = json.loads(path.read_text())
    content["graphs"]["other.onnx"] = content["graphs"]["bn.onnx"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is about other\.onnx, which stage export does not"):
        read_results()


def test_verdict_about_plain_of_batch_norms_weights_is_refused(finished: Path) -> None:
    path = finished / "reports/parity.json"
    content = json.loads(path.read_text())
    content["graphs"]["plain.onnx"]["weights"] = content["graphs"]["bn.onnx"]["weights"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is about a models/plain\.safetensors with SHA-256"):
        read_results()


FILE = {"path": "x", "sha256": "0" * 64}
CHECK = {"name": "probes", "status": "passed", "detail": "fine", "evidence": {}}
GRAPH = {
    "onnx": FILE,
    "weights": FILE,
    "verdict": "parity",
    "parity": True,
    "summary": MEASURED,
    "diagnoses": [],
    "checks": [CHECK],
}
PROVEN = {
    "schema": 1,
    "parity": True,
    "data": FILE | {"images": 500},
    "versions": {},
    "graphs": {"bn.onnx": GRAPH},
}


@pytest.mark.parametrize(
    "contradiction",
    [
        {"parity": False},
        {"graphs": {}},
        {"graphs": {"bn.onnx": GRAPH | {"parity": False}}},
        {"graphs": {"bn.onnx": GRAPH | {"verdict": "no parity"}}},
        {"graphs": {"bn.onnx": GRAPH | {"verdict": "unproven"}}},
        {"graphs": {"bn.onnx": GRAPH | {"checks": []}}},
        {"graphs": {"a": GRAPH, "b": GRAPH | {"checks": [CHECK, CHECK | {"status": "failed"}]}}},
        {"graphs": {"a": GRAPH | {"checks": [CHECK | {"status": "not judged"}]}, "b": GRAPH}},
    ],
)
def test_anything_that_speaks_against_parity_unproves_it(contradiction: dict[str, Any]) -> None:
    assert Parity.model_validate(PROVEN).proven
    assert not Parity.model_validate(PROVEN | contradiction).proven


BAD = GRAPH | {"verdict": "no parity", "parity": False}


@pytest.mark.parametrize(
    ("parity", "graphs", "files", "proven"),
    [
        (True, {"a": GRAPH, "b": GRAPH}, ["a"], True),
        (True, {"a": GRAPH, "b": GRAPH}, ["a", "b"], True),
        (False, {"a": GRAPH, "b": BAD}, ["a"], True),  # b explains the verdict on the whole
        (False, {"a": GRAPH, "b": BAD}, ["a", "b"], False),
        (False, {"a": GRAPH, "b": BAD}, ["b"], False),
        (False, {"a": GRAPH, "b": GRAPH}, ["a"], False),  # nothing does
        (True, {"a": GRAPH}, ["b"], False),
        (True, {"a": GRAPH}, ["a", "b"], False),
        (True, {"a": GRAPH}, [], False),
    ],
)
def test_files_are_proven_by_themselves(
    parity: bool, graphs: dict[str, Any], files: list[str], proven: bool
) -> None:
    report = Parity.model_validate(PROVEN | {"parity": parity, "graphs": graphs})
    assert report.proves(files) is proven


def histogram(edges: list[float], counts: list[int]) -> dict[str, Any]:
    """A summary with this histogram."""
    return MEASURED | {"histogram": {"edges": edges, "counts": counts}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        (
            {"graphs": {"a": GRAPH | {"verdict": "fine"}}},
            r"graphs\.a\.verdict: Input should be 'par",
        ),
        (
            {"graphs": {"a": GRAPH | {"checks": [CHECK | {"status": "ok"}]}}},
            r"graphs\.a\.checks\.0\.status: Input should be 'passed'",
        ),
        (
            {"graphs": {"a": GRAPH | {"summary": histogram([0.0, 0.5], [1, 2, 3])}}},
            r"histogram: Value error, 2 edges and 3 counts do not fit",
        ),
        (
            {"graphs": {"a": GRAPH | {"summary": histogram([8.0], [500])}}},
            r"histogram: Value error, 1 edges and 1 counts do not fit",
        ),
    ],
)
def test_verdict_of_another_kind_is_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps(PROVEN | changes))
    with pytest.raises(UserError, match=f"what `dvc repro verify` writes: .*{problem}"):
        read_record(path, Parity, "verify")


def test_lecture_protocol_says_what_valid_is(finished: Path) -> None:
    path = finished / "reports/metrics/data.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"protocol": "lecture: valid is the test images"}))
    assert read_results().split_labels["valid"] == "valid (= test images)"


def test_test_split_that_changed_after_verify_is_refused(finished: Path) -> None:
    path = finished / "data/prepared/test.safetensors"
    split = load_split(path)
    split.images[0, 0, 0] ^= 1
    save_split(path, split)
    with pytest.raises(UserError, match=r"about a data/prepared/test\.safetensors"):
        read_results()
