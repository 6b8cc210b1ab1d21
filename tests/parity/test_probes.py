import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mnist_batchnorm.parity.probes import check_probes, relative_errors
from mnist_batchnorm.parity.reference import Reference
from mnist_batchnorm.parity.report import LARGEST_ERROR, Check
from mnist_batchnorm.parity.runtime import LEVELS, Passes
from tests.support.parity_networks import Shape, append, cnn, folded, layers_of, mlp, to_onnx

REAL = np.random.default_rng(0).random((40, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(mlp(), layers_of(mlp(), (12,)), (12,), REAL)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return to_onnx(mlp(), (12,))


def probe(graph: onnx.ModelProto | bytes, reference: Reference) -> Check:
    content = graph if isinstance(graph, bytes) else graph.SerializeToString()
    check = check_probes(Passes(content), reference)
    json.dumps(check.evidence, allow_nan=False)
    assert check.name == "probes"
    return check


def changed(graph: onnx.ModelProto, tensor: str, factor: float) -> onnx.ModelProto:
    """Multiply the first number of a tensor."""
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    for stored in other.graph.initializer:
        if stored.name == tensor:
            array = numpy_helper.to_array(stored).copy()
            array.flat[0] *= np.float32(factor)
            stored.CopyFrom(numpy_helper.from_array(array, tensor))
    return other


HONEST: list[tuple[nn.Sequential, Shape]] = [
    *((mlp(seed, gain=gain), (12,)) for seed in range(4) for gain in (1.0, 4.0)),
    *((cnn(gain=gain), (2, 8, 8)) for gain in (1.0, 4.0)),
]


class TestHonest:
    @pytest.mark.parametrize(("model", "shape"), HONEST)
    def test_passes_kept_and_folded(self, model: nn.Sequential, shape: Shape) -> None:
        reference = Reference(model, layers_of(model, shape), shape)
        for way in (model, folded(model)):
            check = probe(to_onnx(way, shape), reference)
            assert check.status == "passed", check.detail
            assert 0 < check.evidence["max_sigmas"] < 6

    def test_evidence_shows_the_distance_from_the_limit(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        evidence = probe(graph, reference).evidence
        families = evidence["families"]
        assert families.keys() == reference.families.keys()
        assert evidence["max_sigmas"] == max(family["sigmas"] for family in families.values())
        assert evidence["natural"] == "real"
        assert evidence["median_tolerance"] == families["real"]["median_tolerance"]
        assert 1e-7 < evidence["median_tolerance"] < 5e-6
        worst = families["real"]
        got, expected = (worst[key] for key in ("got", "expected"))
        exact = reference.families["real"].exact[worst["row"], worst["output"]]
        assert expected == pytest.approx(exact, rel=1e-8)
        sigma = reference.families["real"].sigma[worst["row"], worst["output"]]
        assert abs(got - exact) / sigma == pytest.approx(worst["sigmas"], rel=0.05)
        assert worst["share_of_bound"] < 1
        assert worst["judged"] == worst["inputs"] == 40

    def test_counts_inputs_by_their_largest_error(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        histogram = probe(graph, reference).evidence["histogram"]
        assert histogram["bin"] == 0.5
        assert len(histogram["counts"]) == 17
        assert sum(histogram["counts"]) == 40
        assert histogram["counts"][-1] == 0

    def test_certifies_a_class_that_no_rounding_can_change(self, graph: onnx.ModelProto) -> None:
        reference = Reference(mlp(), layers_of(mlp(), (12,)), (12,), REAL)
        family = reference.natural
        lowest, highest = family.exact - family.bound, family.exact + family.bound
        certain = [
            all(lowest[i, best] > highest[i, k] for k in range(4) if k != best)
            for i, best in enumerate(family.exact.argmax(axis=1))
        ]
        assert probe(graph, reference).evidence["certified"] == sum(certain) > 30
        family.bound[:7] = 100  # as if float32 were that bad
        assert probe(graph, reference).evidence["certified"] == sum(certain[7:])


class TestFaults:
    def test_one_weight_off_by_1e_4_fails(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        check = probe(changed(graph, "0.0", 1 + 1e-4), reference)
        assert check.status == "failed"
        worst = max(family["sigmas"] for family in check.evidence["families"].values())
        assert worst == check.evidence["max_sigmas"] > 8
        assert "beyond 8 sigma of rounding, most input" in check.detail

    def test_counts_the_inputs_beyond(self, graph: onnx.ModelProto, reference: Reference) -> None:
        shift = helper.make_node("Add", ["y", "shift"], ["z"])
        check = probe(append(graph, shift, shift=np.float32(0.1)), reference)
        assert check.evidence["families"]["real"]["rows_beyond"] == 40
        assert check.evidence["histogram"]["counts"][-1] == 40
        assert "real inputs: 40 of 40 beyond" in check.detail

    def test_only_far_inputs_show_a_clipped_unit(self, reference: Reference) -> None:
        """As ReLU6 in ReLU's place: real inputs never reach 6."""
        graph = to_onnx(mlp(), (12,))
        node = next(node for node in graph.graph.node if node.op_type == "Relu")
        node.op_type = "Clip"
        node.input.extend(["low", "high"])
        for name, value in {"low": 0, "high": 6}.items():
            graph.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
        check = probe(graph, reference)
        assert check.status == "failed"
        assert check.evidence["families"]["real"]["rows_beyond"] == 0
        assert check.evidence["families"]["one-hot"]["rows_beyond"] > 0

    def test_numbers_instead_of_nan_fail(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        """As a preprocessing that replaces NaN would: finite inputs show nothing."""
        nodes = [
            helper.make_node("IsNaN", ["x"], ["bad"]),
            helper.make_node("Where", ["bad", "zero", "x"], ["clean"]),
        ]
        other = onnx.ModelProto()
        other.CopyFrom(graph)
        other.graph.node[0].input[0] = "clean"
        kept = [*nodes, *other.graph.node]
        del other.graph.node[:]
        other.graph.node.extend(kept)
        other.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
        check = probe(other, reference)
        assert check.problems == [
            "inputs with all NaN: 1 of 1 give NaN or infinity elsewhere than PyTorch",
            "inputs with NaN: 4 of 4 give NaN or infinity elsewhere than PyTorch",
        ]

    def test_nan_everywhere_is_an_error(self, graph: onnx.ModelProto, reference: Reference) -> None:
        broken = append(graph, helper.make_node("Mul", ["y", "nan"], ["z"]), nan=np.float32(np.nan))
        check = probe(broken, reference)
        assert check.evidence["max_sigmas"] == LARGEST_ERROR
        assert check.evidence["families"]["real"]["got"] is None
        assert "output 0: not finite, float64 gives" in check.detail

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            (
                helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT16),
                "gives float16 [n, 4], expected float32 [n, 4]",
            ),
            (helper.make_node("ArgMax", ["y"], ["z"], axis=1, keepdims=0), "gives int64 [n]"),
            (helper.make_node("Concat", ["y", "y"], ["z"], axis=1), "gives float32 [n, 8]"),
        ],
    )
    def test_an_output_of_another_type_or_shape_is_reported_once(
        self, graph: onnx.ModelProto, reference: Reference, node: onnx.NodeProto, message: str
    ) -> None:
        other = append(graph, node)
        types = {"Cast": TensorProto.FLOAT16, "ArgMax": TensorProto.INT64}
        other.graph.output[0].type.tensor_type.elem_type = types.get(
            node.op_type, TensorProto.FLOAT
        )
        check = probe(other, reference)
        assert check.status == "failed"
        (problem,) = check.problems
        assert problem.startswith(message)

    @pytest.mark.parametrize("content", [b"", b"no model"])
    def test_no_model_at_all(self, content: bytes, reference: Reference) -> None:
        check = probe(content, reference)
        assert check.status == "failed"
        assert "cannot load it" in check.detail
        assert check.evidence["max_sigmas"] is None
        assert check.evidence["histogram"] is None

    def test_a_frozen_batch_axis(self, graph: onnx.ModelProto, reference: Reference) -> None:
        other = append(graph, helper.make_node("Identity", ["y"], ["z"]))
        other.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
        (problem,) = probe(other, reference).problems
        assert "Expected: 32" in problem


class TestWeakness:
    def test_a_unit_that_no_probe_covers_fails(
        self, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "mnist_batchnorm.parity.reference.probe_inputs",
            lambda shape, real: {"normal": np.ones((1, 12), np.float32)},
        )
        monkeypatch.setattr(
            "mnist_batchnorm.parity.reference.find_inputs", lambda layers, sides, starts: starts[:1]
        )
        check = probe(graph, Reference(mlp(), layers_of(mlp(), (12,)), (12,)))
        assert check.status == "failed"
        assert "probes too weak: no input was found for 2[" in check.detail
        assert len(check.evidence["unexercised"]) == check.evidence["units"] == 14

    def test_an_unreachable_side_of_a_unit_is_not_a_fault(self) -> None:
        model = mlp()
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm1d)
        with torch.no_grad():
            norm.weight[0] = 0
        check = probe(to_onnx(model, (12,)), Reference(model, layers_of(model, (12,)), (12,)))
        assert check.status == "passed", check.detail
        assert len(check.evidence["out_of_reach"]) == 1

    @pytest.mark.parametrize("value", [1e38, np.nan])
    def test_a_network_that_is_not_finite_itself_fails(self, value: float) -> None:
        model = mlp()
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.Linear):
                    module.weight.fill_(value)
        check = probe(to_onnx(model, (12,)), Reference(model, layers_of(model, (12,)), (12,)))
        assert check.status == "failed"
        text = "probes too weak: the network itself leaves float32's range on 500 of 500 normal"
        assert any(problem.startswith(text) for problem in check.problems)


class TestUnknownLayers:
    def test_are_not_judged(self, graph: onnx.ModelProto) -> None:
        check = probe(graph, Reference(mlp(), [], (12,), REAL))
        assert check.status == "not judged"
        assert 0 < check.evidence["families"]["real"]["relative_error"] < 1e-5

    def test_still_fail_where_the_file_does_not_run(self) -> None:
        check = probe(b"no model", Reference(mlp(), [], (12,), REAL))
        assert check.status == "failed"


class TestRelativeErrors:
    def test_are_the_largest_of_all_levels(
        self, graph: onnx.ModelProto, reference: Reference
    ) -> None:
        passes = Passes(graph.SerializeToString())
        errors = relative_errors(passes, reference)
        assert errors is not None
        assert errors.shape == (40,)
        exact = reference.natural.exact
        size = np.abs(exact).max(axis=1)
        for level in LEVELS:
            found = np.abs(passes.run("real", REAL, level) - exact).max(axis=1) / size
            assert (errors >= found).all()
        assert 0 < errors.max() < 2e-6

    @pytest.mark.parametrize(("content", "real"), [(None, None), (b"no model", REAL)])
    def test_are_none_where_nothing_was_measured(
        self, graph: onnx.ModelProto, content: bytes | None, real: Any
    ) -> None:
        reference = Reference(mlp(), layers_of(mlp(), (12,)), (12,), real)
        passes = Passes(graph.SerializeToString() if content is None else content)
        assert relative_errors(passes, reference) is None
