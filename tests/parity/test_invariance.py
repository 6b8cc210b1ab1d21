import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mnist_batchnorm.parity.invariance import SETTINGS, Setting, check_invariance
from mnist_batchnorm.parity.reference import Reference
from mnist_batchnorm.parity.report import Check
from mnist_batchnorm.parity.runtime import Passes
from tests.support.parity_networks import append, cnn, folded, layers_of, mlp, to_onnx

REAL = np.random.default_rng(0).random((70, 12)).astype(np.float32)


def judge(graph: onnx.ModelProto | bytes, reference: Reference) -> Check:
    content = graph if isinstance(graph, bytes) else graph.SerializeToString()
    check = check_invariance(Passes(content), reference)
    json.dumps(check.evidence, allow_nan=False)
    assert check.name == "invariance"
    return check


def bit_equal(check: Check) -> dict[str, Any]:
    return {name: d["bit_equal"] for name, d in check.evidence["differences"].items()}


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return to_onnx(mlp(), (12,))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(mlp(), layers_of(mlp(), (12,)), (12,), REAL)


class TestSetting:
    def test_runs_whole_batches_of_all_inputs(self) -> None:
        for setting in SETTINGS:
            rows = setting.rows(10_000, work=26_432)
            assert rows % setting.batch_size == 0
            if setting.threads == 1:
                assert 10_000 - setting.batch_size < rows <= 10_000

    def test_repeats_inputs_where_they_are_fewer_than_a_batch(self) -> None:
        assert Setting(1000, "all", 1).rows(70, work=100) == 1000
        assert Setting(32, "all", 1).rows(70, work=100) == 64

    def test_runs_fewer_rows_of_a_large_network(self) -> None:
        assert Setting(1, "basic", 1).rows(10_000, work=10**7) == 40
        assert Setting(10_000, "all", 1).rows(10_000, work=2 * 10**5) == 10_000
        assert Setting(10_000, "basic", 1).rows(10_000, work=2 * 10**5) == 0
        assert Setting(10_000, "all", 1).rows(10_000, work=10**6) == 0


class TestHonest:
    def test_depends_on_nothing_but_the_input(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        check = judge(graph, reference)
        assert check.status == "passed", check.detail
        evidence = check.evidence
        assert evidence["batch_sizes"] == [1, 2, 7, 32, 1000, 10000]
        assert evidence["passes"] == 6 * 4 * 2
        assert evidence["fails_at_batch_sizes"] == []
        assert evidence["rows_coupled"] is evidence["refuses_empty_batch"] is False
        assert evidence["differences"].keys() == {
            *("batch_size", "level", "threads", "order", "neighbours")
        }

    @pytest.mark.parametrize("fold", [False, True])
    def test_may_depend_on_the_order_of_sums_up_to_rounding(self, fold: bool) -> None:
        model = cnn()
        reference = Reference(model, layers_of(model, (2, 8, 8)), (2, 8, 8))
        check = judge(to_onnx(folded(model) if fold else model, (2, 8, 8)), reference)
        assert check.status == "passed", check.detail
        assert check.evidence["rows_coupled"] is False
        for difference in check.evidence["differences"].values():
            assert 0 <= difference["max_sigmas"] < 12
            assert difference["bit_equal"] == (difference["max_sigmas"] == 0)

    def test_evidence_says_which_results_are_bit_equal(
        self, reference: Reference, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A level that computes the last layer in two parts, as one with other kernels might."""
        whole, halves = to_onnx(mlp(), (12,)), to_onnx(mlp(), (12,))
        last = halves.graph.node[-1]
        last.output[0] = "sum"
        halves.graph.node.extend(
            [
                helper.make_node("Mul", ["sum", "third"], ["part"]),
                helper.make_node("Sub", ["sum", "part"], ["rest"]),
                helper.make_node("Add", ["rest", "part"], ["y"]),
            ]
        )
        third = onnx.numpy_helper.from_array(np.float32(1 / 3), "third")
        halves.graph.initializer.append(third)
        passes = Passes(whole.SerializeToString())
        other = Passes(halves.SerializeToString())
        own = passes.session
        monkeypatch.setattr(
            passes,
            "session",
            lambda level, threads=1: (other.session if level == "basic" else own)(level, threads),
        )
        check = check_invariance(passes, reference)
        assert check.status == "passed", check.detail
        assert bit_equal(check) == {
            "batch_size": True,
            "level": False,
            "threads": True,
            "order": True,
            "neighbours": True,
        }
        assert check.detail.endswith("not bit-equal with level")
        assert 0 < check.evidence["differences"]["level"]["max_sigmas"] < 16


class TestFaults:
    def test_a_frozen_batch_axis_runs_at_one_size(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        other = append(graph, helper.make_node("Identity", ["y"], ["z"]))
        other.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
        check = judge(other, reference)
        assert check.status == "failed"
        assert check.evidence["fails_at_batch_sizes"] == [1, 2, 7, 1000, 10000]
        assert check.evidence["batch_sizes"] == [32]
        assert check.evidence["refuses_empty_batch"] is True
        assert check.evidence["rows_coupled"] is False
        assert check.detail.startswith("fails at batch size 1, 2, 7, 1000, 10000 in 40 passes")
        assert "runs at 32" in check.detail

    def test_a_reshape_to_one_row_fails_beyond_it(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        reshape = helper.make_node("Reshape", ["y", "shape"], ["z"])
        check = judge(append(graph, reshape, shape=np.array([1, 4])), reference)
        assert check.evidence["fails_at_batch_sizes"] == [2, 7, 32, 1000, 10000]
        assert check.evidence["batch_sizes"] == [1]

    @pytest.mark.parametrize(
        "node",
        [
            helper.make_node("Softmax", ["y"], ["z"], axis=0),
            helper.make_node("CumSum", ["y", "axis"], ["z"]),
            helper.make_node("MeanVarianceNormalization", ["y"], ["z"], axes=[0]),
        ],
    )
    def test_operators_along_the_batch_couple_rows(
        self, graph: onnx.ModelProto, reference: Reference, node: onnx.NodeProto
    ) -> None:
        check = judge(append(graph, node, axis=np.array(0)), reference)
        assert check.status == "failed"
        assert check.evidence["rows_coupled"] is True
        differences = check.evidence["differences"]
        assert "1 against 1000" in differences["batch_size"]["beyond"]
        assert differences["order"]["beyond"]
        assert differences["neighbours"]["beyond"]
        assert differences["level"]["beyond"] == differences["threads"]["beyond"] == []
        assert "results change with batch size (1 against 1000" in check.detail

    def test_batch_norm_in_training_mode_couples_rows(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        other = onnx.ModelProto()
        other.CopyFrom(graph)
        norm = other.graph.node[1]
        norm.attribute.append(helper.make_attribute("training_mode", 1))
        norm.output.extend(["mean", "variance"])
        check = judge(other, reference)
        assert check.status == "failed"
        assert check.evidence["rows_coupled"] is True

    def test_a_neighbors_nan_alone_is_detected(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        """0 times the sum of the batch: nothing, unless there is a NaN in it."""
        nodes = [
            helper.make_node("ReduceSum", ["y", "axis"], ["sum"], keepdims=1),
            helper.make_node("Mul", ["sum", "zero"], ["none"]),
            helper.make_node("Add", ["y", "none"], ["z"]),
        ]
        other = append(graph, *nodes, axis=np.array([0]), zero=np.float32(0))
        check = judge(other, reference)
        assert check.status == "failed"
        assert check.evidence["rows_coupled"] is True
        assert bit_equal(check)["batch_size"]
        assert bit_equal(check)["order"]
        assert check.evidence["differences"]["neighbours"]["beyond"]

    def test_random_outputs_are_never_the_same(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        nodes = [
            helper.make_node("RandomNormalLike", ["y"], ["noise"], scale=1e-3),
            helper.make_node("Add", ["y", "noise"], ["z"]),
        ]
        check = judge(append(graph, *nodes), reference)
        assert check.status == "failed"

    @pytest.mark.parametrize("content", [b"", b"no model"])
    def test_an_invalid_model_is_reported_once(self, content: bytes, reference: Reference) -> None:
        check = judge(content, reference)
        assert check.status == "failed"
        assert len(check.problems) == 1
        assert check.evidence["batch_sizes"] == []

    def test_an_empty_batch_gives_an_empty_output(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        """The first rows, but at least one, of the output and a row of zeros."""
        nodes = [
            helper.make_node("Shape", ["y"], ["rows"], end=1),
            helper.make_node("Max", ["rows", "one"], ["end"]),
            helper.make_node("Concat", ["y", "more"], ["all"], axis=0),
            helper.make_node("Slice", ["all", "none", "end"], ["z"]),
        ]
        more = {"one": np.array([1]), "none": np.array([0]), "more": np.zeros((1, 4), np.float32)}
        check = judge(append(graph, *nodes, **more), reference)
        assert check.problems == ["an empty batch: z has shape (1, 4) for a batch of 0"]

    def test_an_empty_batch_may_be_refused(self) -> None:
        """As of an honest Reshape to [0, -1], whose -1 is then anything."""
        model = cnn()
        graph = to_onnx(model, (2, 8, 8))
        flatten = next(node for node in graph.graph.node if node.op_type == "Flatten")
        flatten.op_type = "Reshape"
        flatten.input.append("shape")
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, -1]), "shape"))
        check = judge(graph, Reference(model, layers_of(model, (2, 8, 8)), (2, 8, 8)))
        assert check.status == "passed", check.detail
        assert check.evidence["refuses_empty_batch"] is True
        assert check.detail.endswith("(an empty batch is refused)")


class TestUnknownLayers:
    def test_pass_if_bit_equal(self, graph: onnx.ModelProto) -> None:
        reference = Reference(mlp(), [], (12,), REAL)
        check = judge(graph, reference)
        assert check.status == ("passed" if all(bit_equal(check).values()) else "not judged")

    def test_are_not_judged_if_not_bit_equal(self, graph: onnx.ModelProto) -> None:
        reference = Reference(mlp(), [], (12,), REAL)
        check = judge(append(graph, helper.make_node("Softmax", ["y"], ["z"], axis=0)), reference)
        assert check.status == "not judged"
        assert "results change with batch size" in check.detail

    def test_fail_where_the_file_does(self) -> None:
        assert judge(b"no model", Reference(mlp(), [], (12,), REAL)).status == "failed"
