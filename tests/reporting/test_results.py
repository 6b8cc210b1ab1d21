import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS
from mnist_batchnorm.artifacts.metrics import EvaluationMetrics
from mnist_batchnorm.artifacts.parity_report import Parity
from mnist_batchnorm.artifacts.predictions import CONFUSION_COLUMNS, read_confusion
from mnist_batchnorm.artifacts.reading import read_record, read_table
from mnist_batchnorm.artifacts.splits import load_split, save_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.reporting import results
from mnist_batchnorm.reporting.results import read_results
from tests.conftest import ROOT
from tests.support.finished import MEASURED, finish

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


@pytest.fixture(scope="module")
def run(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(ROOT / "params.yaml", folder)
    finish(folder, prepared, params)
    return folder


@pytest.fixture
def finished(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    monkeypatch.chdir(folder)
    return folder


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


def test_predictions_for_other_images_are_refused(finished: Path) -> None:
    path = finished / "reports/predictions/plain.csv"
    lines = path.read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"plain\.csv is about other images"):
        read_results()


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[:1],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [lines[0], *lines[7:], *lines[1:7]],
        lambda lines: [line.replace("bn,1,", "bn,2,") for line in lines],
    ],
    ids=["cut short", "of one run", "other order", "plain first", "other seeds"],
)
def test_curves_of_other_seeds_are_refused(
    finished: Path, change: Callable[[list[str]], list[str]]
) -> None:
    path = finished / "reports/curves/seeds.csv"
    lines = path.read_text().splitlines()
    assert len(lines) == 13
    kept = change(lines) if len(change(lines)) > 1 else lines[:2]
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match=r"seeds\.csv is about other runs .*run `dvc repro seeds`"):
        results.read_seeds()


def test_curve_of_an_unknown_network_is_refused(finished: Path) -> None:
    path = finished / "reports/curves/seeds.csv"
    path.write_text(path.read_text().replace("plain", "fancy"))
    with pytest.raises(UserError, match=r"seeds\.csv is not what .* writes: .*'fancy'"):
        results.read_seeds()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"seeds": 2', '"seeds": 3', "Value error, 3 seeds and 2 values do not fit"),
        ('"seeds": 2', '"seeds": 1', "seeds: Input should be greater than"),
        ('"mean": 0.9', '"mean": null, "x": 0.9', r"test_accuracy\.mean"),
        ('"sd": 0.0', '"sd": NaN, "x": 0.0', r"test_accuracy\.sd: Input should be a finite"),
        ('"interval_95"', '"interval"', r"bn_minus_plain\.test_accuracy\.interval_95"),
        ('"device"', '"machine"', "device: Field required"),
    ],
)
def test_malformed_figures_over_seeds_are_refused(
    finished: Path, old: str, new: str, problem: str
) -> None:
    path = finished / "reports/metrics/seeds.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"seeds\.json is not .* writes: .*{problem}"):
        results.read_seeds()


def test_checkpoint_without_a_statistic_is_refused(finished: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = finished / "models/bn.safetensors"
    tensors = load_file(path)
    del tensors["bn2.running_var"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lacks 'bn2\.running_var'"):
        results.read_layers(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        results.read_layers(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epoch,loss\n1,2\n", "its columns are 'epoch,loss'"),
        (",".join(CURVE_COLUMNS), "no rows"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4\n", "5 finite numbers"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4,nan\n", "5 finite numbers"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4,x\n", "x"),
    ],
)
def test_malformed_table_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bn.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro train` writes: .*{problem}"):
        read_table(path, CURVE_COLUMNS, "train")


def confusion_csv(rows: dict[int, str]) -> str:
    """A diagonal confusion matrix with these accuracies."""
    lines = [
        ",".join([str(digit), *(str(int(digit == c)) for c in range(10)), accuracy])
        for digit, accuracy in rows.items()
    ]
    return "\n".join([",".join(CONFUSION_COLUMNS), *lines]) + "\n"


def test_class_without_images_has_no_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "bn.csv"
    path.write_text(confusion_csv(dict.fromkeys(range(10), "") | {4: "0.25", 9: "1.0"}))
    matrix, accuracy = read_confusion(path)
    np.testing.assert_array_equal(matrix, np.eye(10, dtype=np.int64), strict=True)
    assert accuracy == {4: 0.25, 9: 1.0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (confusion_csv(dict.fromkeys(range(9), "1.0")), "not the classes 0 to 9"),
        (confusion_csv(dict.fromkeys(reversed(range(10)), "1.0")), "not the classes 0 to 9"),
        (confusion_csv(dict.fromkeys(range(10), "inf")), "12 finite numbers"),
        (confusion_csv(dict.fromkeys(range(10), "1.0")).replace("\n0,1,", "\n0,,"), "''"),
        (",".join(CONFUSION_COLUMNS) + "\n0,1,2\n", "column"),
    ],
)
def test_malformed_confusion_matrix_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bn.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro evaluate` writes: .*{problem}"):
        read_confusion(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "the file: Invalid JSON"),
        ("[]", "the file"),
        ('{"accuracy": "high"}', "accuracy"),
        ("{}", "accuracy: Field required"),
    ],
)
def test_malformed_record_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "test-bn.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro evaluate` writes: {problem}"):
        read_record(path, EvaluationMetrics, "evaluate")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"parity\.json cannot be read"):
        read_record(path, Parity, "verify")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "input"


numbers = st.text(alphabet="0123456789.,-+einfa \n\r#\"'\0", max_size=60)


@example(body="#")  # starts a comment, says numpy, and warns of a file without data
@given(body=st.one_of(numbers, st.text(max_size=60)))
def test_any_table_is_read_or_refused(scratch: Path, body: str) -> None:
    scratch.write_bytes(b"x,y\n" + body.encode(errors="surrogatepass"))
    try:
        table = read_table(scratch, ("x", "y"), "train")
    except UserError:
        return
    assert table["x"].shape == table["y"].shape
    assert len(table["x"]) > 0
    assert np.isfinite(np.concatenate(list(table.values()))).all()


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
