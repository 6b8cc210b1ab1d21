import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from mnist_batchnorm.parity.behavior import check_behavior
from mnist_batchnorm.parity.reference import Reference
from mnist_batchnorm.parity.report import Check
from mnist_batchnorm.parity.runtime import Passes
from tests.support.parity_networks import append, layers_of, mlp, to_onnx

REAL = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)


def classes(model: nn.Sequential) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(REAL)).argmax(dim=1).numpy()
    return found


def judge(graph: onnx.ModelProto | bytes, reference: Reference) -> Check:
    content = graph if isinstance(graph, bytes) else graph.SerializeToString()
    check = check_behavior(Passes(content), reference)
    json.dumps(check.evidence, allow_nan=False)
    assert check.name == "behaviour"
    return check


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return to_onnx(mlp(), (12,))


@pytest.fixture(scope="module")
def reference() -> Reference:
    labels = classes(mlp())
    labels[:50] = (labels[:50] + 1) % 4  # a quarter wrong
    return Reference(mlp(), layers_of(mlp(), (12,)), (12,), REAL, labels)


def test_a_correct_file_predicts_the_networks_classes(
    graph: onnx.ModelProto, reference: Reference
) -> None:
    check = judge(graph, reference)
    assert check.status == "passed"
    assert check.detail == (
        "the class of all 200 real inputs is float64's; "
        "accuracy 0.7500, PyTorch 0.7500, float64 0.7500"
    )
    assert check.evidence["accuracy"] == {"onnxruntime": 0.75, "pytorch": 0.75, "float64": 0.75}
    assert (check.evidence["differences"], check.evidence["undecided"]) == (0, 0)


def test_permuted_rows_of_the_last_layer(graph: onnx.ModelProto, reference: Reference) -> None:
    order = np.array([1, 2, 3, 0])
    other = append(graph, helper.make_node("Gather", ["y", "order"], ["z"], axis=1), order=order)
    check = judge(other, reference)
    assert check.status == "failed"
    first, second = check.problems
    exact = reference.natural.exact.argmax(axis=1)
    assert first == (
        f"the class of 200 of 200 real inputs differs, first of input 0: {(exact[0] - 1) % 4}, "
        f"float64 gives {exact[0]}"
    )
    assert second.endswith("PyTorch has 0.7500")
    assert check.evidence["differences"] == 200


def test_a_tie_may_go_either_way() -> None:
    """Two rows of the last layer are the same, so rounding decides between their outputs."""
    model = mlp()
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight[1] = last.weight[0]
        last.bias[1] = last.bias[0]
    reference = Reference(model, layers_of(model, (12,)), (12,), REAL)
    tied = int((reference.natural.exact.argmax(axis=1) == 0).sum())
    assert tied > 20
    nudge = np.array([0, 1e-7, 0, 0], np.float32)
    other = append(
        to_onnx(model, (12,)), helper.make_node("Add", ["y", "nudge"], ["z"]), nudge=nudge
    )
    check = judge(other, reference)
    assert check.status == "passed", check.detail
    assert check.evidence["undecided"] == tied
    assert f"but for {tied} that rounding decides" in check.detail
    nudge[1] = 1e-3  # no longer rounding, but still undecided: what the probes are for
    assert judge(other, reference).evidence["differences"] == 0


def test_without_labels_there_is_no_accuracy(graph: onnx.ModelProto) -> None:
    check = judge(graph, Reference(mlp(), layers_of(mlp(), (12,)), (12,), REAL))
    assert check.status == "passed"
    assert check.evidence["accuracy"] == dict.fromkeys(("onnxruntime", "pytorch", "float64"))
    assert "accuracy" not in check.detail


def test_without_inputs_synthetic_ones_are_compared(graph: onnx.ModelProto) -> None:
    check = judge(graph, Reference(mlp(), layers_of(mlp(), (12,)), (12,)))
    assert check.status == "passed"
    assert check.evidence["kind"] == "normal and uniform"
    assert check.evidence["inputs"] == 1000


def test_nan_is_not_a_class(graph: onnx.ModelProto, reference: Reference) -> None:
    """The largest of NaN is the first to NumPy: it must not count as class 0."""
    nan = np.full(4, np.nan, np.float32)
    other = append(graph, helper.make_node("Add", ["y", "nan"], ["z"]), nan=nan)
    check = judge(other, reference)
    assert check.evidence["differences"] == 200
    assert check.evidence["accuracy"]["onnxruntime"] == 0


def test_a_file_that_does_not_run_fails(reference: Reference) -> None:
    check = judge(b"no model", reference)
    assert check.status == "failed"
    assert "cannot load it" in check.detail


def test_a_network_of_unsupported_layers_is_judged_by_float64(graph: onnx.ModelProto) -> None:
    reference = Reference(mlp(), [], (12,), REAL)
    assert judge(graph, reference).status == "passed"
    other = append(graph, helper.make_node("Neg", ["y"], ["z"]))
    assert judge(other, reference).status == "failed"
