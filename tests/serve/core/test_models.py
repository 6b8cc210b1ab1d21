"""Which files are served: the gate has passed them, and they reproduce their golden outputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS, PARITY, SERVED
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.models import Model
from tests.support.serving import lay, network


def load(name: str = "mnist-bn", *, allow_unverified: bool = False) -> Model:
    return models.load(name, MODELS / SERVED[name], PARITY, allow_unverified=allow_unverified)


def edit(change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads(PARITY.read_text())
    change(report)
    PARITY.write_text(json.dumps(report))


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laid")
    lay(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(laid, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "classes", "says"),
    [(784, 7, r"float32 \[1, 7\] for one image, expected float32 \[1, 10\]"), (28, 10, "run on")],
)
def test_another_interface_is_an_error_even_if_unverified_files_are_allowed(
    pixels: int, classes: int, says: str
) -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("image", pixels), ("logits", classes))
    ]
    weights = numpy_helper.from_array(np.ones((pixels, classes), np.float32), "weights")
    node = helper.make_node("MatMul", ["image", "weights"], ["logits"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=opset), "other.onnx")

    with pytest.raises(UserError, match=says):
        models.load("other", Path("other.onnx"), PARITY, allow_unverified=True)


@pytest.mark.parametrize("name", SERVED)
def test_a_proven_file_is_served(name: str) -> None:
    model = load(name)

    assert model.verified
    assert model.version == model.sha256[:12]
    assert model.run(np.zeros((3, 784), np.float32)).shape == (3, 10)


def test_batch_statistics_in_training_mode_are_detected_despite_the_report(tmp_path: Path) -> None:
    lay(tmp_path, replace(network(), training_mode=1))

    with pytest.raises(CheckFailedError, match="depends on which others come with it"):
        load()


def test_outputs_that_differ_are_detected_despite_the_report() -> None:
    def move(report: dict[str, Any]) -> None:
        report["goldens"]["logits"]["bn.onnx"][3][0] *= 1.01

    edit(move)

    with pytest.raises(CheckFailedError, match="its outputs are off by"):
        load()
    assert load("mnist-bn-folded").verified


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report.pop("goldens"), "holds no golden outputs of it"),
        (lambda report: report["goldens"]["logits"].pop("bn.onnx"), "holds no golden outputs"),
        (lambda report: report["goldens"]["logits"]["bn.onnx"].pop(), "that are none"),
        (lambda report: report["goldens"].update(images="AAAA"), "that are none"),
        (lambda report: report["goldens"].update(images=""), "holds no golden outputs"),
        (lambda report: report["goldens"]["logits"]["bn.onnx"][0].__setitem__(0, 1e39), "off by"),
        (lambda report: report.update(parity=False), "no parity"),
    ],
)
def test_a_report_without_goldens_proves_nothing(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(change)

    with pytest.raises(CheckFailedError, match=says):
        load()
    model = load(allow_unverified=True)
    assert says in (model.unproven or "")


def test_an_altered_file_is_not_served() -> None:
    path = MODELS / SERVED["mnist-bn"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(CheckFailedError, match=r"models/bn.onnx is not served.*dvc repro verify"):
        load()


@pytest.mark.parametrize("report", [None, "{", '{"schema": 1}'], ids=["none", "half", "empty"])
def test_without_the_gates_report_nothing_is_served(report: str | None) -> None:
    PARITY.unlink() if report is None else PARITY.write_text(report)

    with pytest.raises(CheckFailedError, match=r"parity\.json"):
        load()


def test_a_file_that_failed_a_check_is_not_served() -> None:
    edit(lambda report: report["graphs"]["bn-folded.onnx"]["checks"][2].update(status="failed"))

    with pytest.raises(CheckFailedError, match=r"bn-folded.onnx is not served.*no parity"):
        load("mnist-bn-folded")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.onnx", "no none.onnx; run `dvc repro export` first"),
        ("reports", "reports cannot be read"),
        ("x.onnx", "x.onnx is no ONNX model that runs"),
    ],
)
def test_a_file_that_is_not_a_model_is_an_error(path: str, message: str) -> None:
    Path("x.onnx").write_bytes(b"no model")

    with pytest.raises(UserError, match=message):
        models.load("x", Path(path), PARITY, allow_unverified=True)
