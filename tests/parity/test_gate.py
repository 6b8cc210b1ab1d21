"""The gate passes honest exports and stops the four classic bad ones, each for its reason."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mnist_batchnorm.batchnorm import batch_norm_layers
from mnist_batchnorm.dataset import network_input
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.export import embed_provenance, export_onnx
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity import GraphReport, Reference, check_graph
from mnist_batchnorm.parity.outputs import check_outputs, relative_error
from mnist_batchnorm.parity.report import LARGEST
from mnist_batchnorm.parity.structure import check_structure
from tests.parity.conftest import (
    BATCH_SIZES,
    IMAGES,
    LIMIT,
    Judge,
    legacy_export,
    random_images,
    torch_export,
)


def failed(report: GraphReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.passed}


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint) -> dict[bool, bytes]:
    """The project's own export: folded or not -> bytes."""
    model = checkpoint.model()
    return {fold: export_onnx(model, 20, fold).SerializeToString() for fold in (False, True)}


@pytest.fixture
def kept(graphs: dict[bool, bytes]) -> onnx.ModelProto:
    return onnx.load_from_string(graphs[False])


@pytest.fixture
def folded(graphs: dict[bool, bytes]) -> onnx.ModelProto:
    return onnx.load_from_string(graphs[True])


def set_tensor(graph: onnx.ModelProto, name: str, index: int, value: float) -> None:
    tensor = next(t for t in graph.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[index] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def get_tensor(graph: onnx.ModelProto, name: str) -> np.ndarray:
    (tensor,) = (t for t in graph.graph.initializer if t.name == name)
    array: np.ndarray = numpy_helper.to_array(tensor)
    return array


class TestHonest:
    def test_kept(self, judge: Judge, kept: onnx.ModelProto) -> None:
        report = judge(kept)
        assert report.parity, failed(report)
        assert report.outputs["max_relative_error"] < 2e-6
        assert len(report.outputs["passes"]) == 4 * len(BATCH_SIZES)

    def test_folded(self, judge: Judge, folded: onnx.ModelProto) -> None:
        report = judge(folded, folded=True)
        assert report.parity, failed(report)

    def test_each_images_largest_error(self, judge: Judge, kept: onnx.ModelProto) -> None:
        report = judge(kept)
        assert report.errors is not None
        assert report.errors.shape == (IMAGES,)
        assert report.errors.max() == report.outputs["max_relative_error"]

    def test_distance_from_pytorch(
        self, judge: Judge, kept: onnx.ModelProto, reference: Reference
    ) -> None:
        report = judge(kept)
        distances = [p["max_relative_error_vs_pytorch"] for p in report.outputs["passes"]]
        summary = report.to_json()["max_relative_error_vs_pytorch"]
        assert summary == report.outputs["max_relative_error_vs_pytorch"] == max(distances)
        assert summary <= 1.01 * (  # the triangle inequality
            report.outputs["max_relative_error"] + report.outputs["pytorch_max_relative_error"]
        )

    def test_legacy_exporter_in_eval_mode(
        self, judge: Judge, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        graph = legacy_export(checkpoint.model(), torch.onnx.TrainingMode.EVAL, tmp_path)
        report = judge(graph)
        assert report.parity, failed(report)


class TestNegativeControls:
    """The exports that ship broken models every day; the project exists to stop them."""

    def test_exported_in_training_mode(
        self, judge: Judge, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        model = checkpoint.model().train()
        graph = legacy_export(model, torch.onnx.TrainingMode.TRAINING, tmp_path)
        problems = failed(judge(graph))
        assert "training_mode is 1, expected 0" in problems["structure"]
        assert "outputs" in problems

    def test_reset_statistics(self, judge: Judge, checkpoint: Checkpoint) -> None:
        model = checkpoint.model()
        for layer in batch_norm_layers(model).values():
            layer.reset_running_stats()
        problems = failed(judge(torch_export(model)))
        assert "bn1.running_mean: 16 of 16 numbers differ" in problems["weights"]
        assert "outputs" in problems
        assert "structure" not in problems

    def test_statistics_touched_by_one_forward_in_train_mode(
        self, judge: Judge, checkpoint: Checkpoint
    ) -> None:
        model = checkpoint.model().train()
        with torch.no_grad():
            model(torch.from_numpy(network_input(random_images(5, 32))))
        problems = failed(judge(torch_export(model.eval())))
        assert "bn1.running_mean" in problems["weights"]
        assert "outputs" in problems
        assert "structure" not in problems

    def test_frozen_batch_axis(self, judge: Judge, checkpoint: Checkpoint) -> None:
        problems = failed(judge(torch_export(checkpoint.model(), batch=32)))
        assert "batch axis of input image is frozen at 32" in problems["structure"]
        assert "batch 1: ONNX Runtime fails" in problems["outputs"]
        assert "weights" not in problems


class TestOneFault:
    """Each check on its own: one fault in an otherwise honest file."""

    def test_last_bit_of_one_statistic(self, judge: Judge, kept: onnx.ModelProto) -> None:
        value = get_tensor(kept, "bn1.running_var")[3]
        set_tensor(kept, "bn1.running_var", 3, np.nextafter(value, np.float32(np.inf)))
        assert "bn1.running_var: 1 of 16 numbers differ" in failed(judge(kept))["weights"]

    @pytest.mark.parametrize("name", ["linear1.weight", "linear2.bias"])
    def test_folded_number_beyond_rounding(
        self, judge: Judge, folded: onnx.ModelProto, name: str
    ) -> None:
        value = get_tensor(folded, name).flat[5]
        set_tensor(folded, name, 5, value * 1.00001 + 1e-4 * (name == "linear2.bias"))
        assert f"{name}[" in failed(judge(folded, folded=True))["weights"]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_folded_number_not_finite(
        self, judge: Judge, folded: onnx.ModelProto, value: float
    ) -> None:
        set_tensor(folded, "linear1.weight", 0, value)
        report = judge(folded, folded=True)
        json.dumps(report.to_json(), allow_nan=False)
        problems = failed(report)
        assert "linear1.weight[0, 0]" in problems["weights"]
        assert "outputs" in problems

    def test_epsilon(self, judge: Judge, kept: onnx.ModelProto) -> None:
        attribute = next(a for a in kept.graph.node[1].attribute if a.name == "epsilon")
        attribute.f = 1e-3
        assert "epsilon is 0.001" in failed(judge(kept))["structure"]

    def test_softmax_at_the_end(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.graph.node[-1].output[0] = "scores"
        kept.graph.node.append(onnx.helper.make_node("Softmax", ["scores"], ["logits"]))
        problems = failed(judge(kept))
        assert "Softmax" in problems["structure"]
        assert "cannot be matched" in problems["weights"]
        assert "outputs" in problems

    def test_relu_rewired_past_batch_norm(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.graph.node[2].input[0] = kept.graph.node[0].output[0]
        assert "reads" in failed(judge(kept))["structure"]

    def test_renamed_input(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.graph.input[0].name = kept.graph.node[0].input[0] = "x"
        assert "inputs are ['x'], expected ['image']" in failed(judge(kept))["structure"]

    def test_weight_that_the_caller_may_override(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.graph.input.append(
            onnx.helper.make_tensor_value_info("linear1.bias", onnx.TensorProto.FLOAT, [16])
        )
        problems = failed(judge(kept))
        assert "inputs are ['image', 'linear1.bias']" in problems["structure"]

    def test_weight_outside_the_file(self, judge: Judge, kept: onnx.ModelProto) -> None:
        tensor = kept.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "weights.bin"
        problems = failed(judge(kept))
        assert "weights outside the file" in problems["structure"]
        assert "not compared" in problems["weights"]
        assert "outputs" in problems

    def test_unused_initializer(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "old"))
        assert "stored but not the network's: old" in failed(judge(kept))["weights"]

    def test_another_networks_file(
        self, checkpoint: Checkpoint, judge: Judge, kept: onnx.ModelProto
    ) -> None:
        other = dataclasses.replace(
            checkpoint, architecture=dataclasses.replace(checkpoint.architecture, bn_eps=1e-3)
        )
        report = judge(export_onnx(other.model(), 20, fold=False))
        assert "epsilon" in failed(report)["structure"]

    @pytest.mark.parametrize("keep", [0, 1, 1000])
    def test_truncated(self, judge: Judge, kept: onnx.ModelProto, keep: int) -> None:
        assert not judge(kept.SerializeToString()[:keep]).parity

    def test_the_other_form(
        self, judge: Judge, kept: onnx.ModelProto, folded: onnx.ModelProto
    ) -> None:
        for report in (judge(kept, folded=True), judge(folded, folded=False)):
            problems = failed(report)
            assert "operators are Gemm" in problems["structure"]
            assert "cannot be matched" in problems["weights"]

    @pytest.mark.parametrize(
        "part", ["training_info", "functions", "sparse_initializer", "quantization_annotation"]
    )
    def test_part_that_no_check_reads(
        self, checkpoint: Checkpoint, kept: onnx.ModelProto, part: str
    ) -> None:
        getattr(kept if hasattr(kept, part) else kept.graph, part).add()
        check = check_structure(kept, checkpoint.architecture, folded=False)
        assert f"holds {part}" in check.detail

    def test_second_operator_set(self, judge: Judge, kept: onnx.ModelProto) -> None:
        kept.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        assert "ai.onnx, com.microsoft" in failed(judge(kept))["structure"]

    def test_batch_axis_frozen_inside(self, judge: Judge, kept: onnx.ModelProto) -> None:
        inner = kept.graph.node[0].output[0]
        (value,) = (v for v in kept.graph.value_info if v.name == inner)
        value.type.tensor_type.shape.dim[0].dim_value = 32
        assert f"batch axis of {inner} is frozen at 32" in failed(judge(kept))["structure"]

    def test_batch_axes_of_different_names(
        self, checkpoint: Checkpoint, kept: onnx.ModelProto
    ) -> None:
        kept.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
        check = check_structure(kept, checkpoint.architecture, folded=False)
        assert "batch axes of input and output differ: batch, rows" in check.detail

    @pytest.mark.parametrize("images", [IMAGES, 0])
    def test_nothing_ran(self, images: int, kept: onnx.ModelProto, reference: Reference) -> None:
        empty = Reference(
            *(getattr(reference, f.name)[:images] for f in dataclasses.fields(reference))
        )
        sizes = BATCH_SIZES if images == 0 else ()
        check, errors = check_outputs(kept.SerializeToString(), empty, sizes, LIMIT)
        assert not check.passed
        assert "no pass ran" in check.evidence["problems"][-1]
        assert errors is None

    def test_pytorch_itself_is_undecided(self, kept: onnx.ModelProto, reference: Reference) -> None:
        pytorch = reference.pytorch.copy()
        pytorch[5] = np.roll(pytorch[5], 1)
        undecided = dataclasses.replace(reference, pytorch=pytorch)
        check, _ = check_outputs(kept.SerializeToString(), undecided, [IMAGES], LIMIT)
        assert not check.passed
        assert "PyTorch's own float32 disagrees with float64 here" in check.detail
        assert "predictions differ" not in check.detail

    def test_not_onnx(self, judge: Judge) -> None:
        assert "file" in failed(judge(b"<html>not found</html>"))


class TestProvenance:
    @pytest.fixture
    def honest(
        self, kept: onnx.ModelProto, weights: Path, checkpoint: Checkpoint
    ) -> onnx.ModelProto:
        embed_provenance(kept, weights, checkpoint)
        return kept

    def problems(self, judge: Judge, graph: onnx.ModelProto) -> str:
        found = failed(judge(graph.SerializeToString()))
        assert list(found) == ["provenance"]
        return found["provenance"]

    def test_missing(self, judge: Judge, kept: onnx.ModelProto) -> None:
        assert "does not say which checkpoint" in self.problems(judge, kept)

    @pytest.mark.parametrize(
        "key", ["weights_sha256", "train_data_sha256", "train_params_sha256", "input", "output"]
    )
    def test_one_entry_missing_or_different(
        self, judge: Judge, honest: onnx.ModelProto, key: str
    ) -> None:
        (entry,) = (e for e in honest.metadata_props if e.key == f"mnist_batchnorm.{key}")
        entry.value = "f" * 64
        assert "ffffffffffff" in self.problems(judge, honest)
        honest.metadata_props.remove(entry)
        assert f"mnist_batchnorm.{key} is missing" in self.problems(judge, honest)

    def test_one_entry_twice(self, judge: Judge, honest: onnx.ModelProto) -> None:
        honest.metadata_props.add().CopyFrom(honest.metadata_props[0])
        assert "metadata_props" in failed(judge(honest.SerializeToString()))["structure"]

    def test_unknown_entry(self, judge: Judge, honest: onnx.ModelProto) -> None:
        entry = honest.metadata_props.add()
        entry.key, entry.value = "host", "build-7"
        assert "does not write: host" in self.problems(judge, honest)

    def test_remarks_inside_the_graph(self, judge: Judge, honest: onnx.ModelProto) -> None:
        honest.graph.node[0].attribute[0].doc_string = "/home/someone/train.py"
        honest.graph.node[0].metadata_props.add().key = "pkg.torch.onnx.stack_trace"
        problems = self.problems(judge, honest)
        assert "1 x doc_string of AttributeProto" in problems
        assert "1 x metadata_props of NodeProto" in problems

    def test_missing_file_is_the_callers_mistake(
        self, tmp_path: Path, checkpoint: Checkpoint, weights: Path, reference: Reference
    ) -> None:
        path = tmp_path / "no-such.onnx"
        with pytest.raises(UserError, match=r"no-such\.onnx"):
            check_graph(path, weights, checkpoint, reference, BATCH_SIZES, LIMIT, folded=False)


def test_relative_error_is_of_the_rows_largest_logit() -> None:
    exact = np.array([[1e-9, 10.0], [1.0, 2.0], [1.0, 2.0]])
    logits = np.array([[1e-6, 10.0], [1.0, 2.5], [np.nan, 2.0]], dtype=np.float32)
    error = relative_error(logits, exact)
    assert error[0] == pytest.approx(1e-7, rel=1e-2)
    assert error[1] == 0.25
    assert error[2] == LARGEST


def test_reference_is_computed_by_one_thread(checkpoint: Checkpoint) -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return x

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Reference.compute(Counting(), np.zeros((2, 10), np.float32), np.zeros(2, np.uint8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_reference_leaves_the_model_as_it_was(checkpoint: Checkpoint) -> None:
    model = checkpoint.model()
    images = network_input(random_images(3, 8))
    reference = Reference.compute(model, images, np.zeros(8, np.uint8))
    assert reference.exact.dtype == np.float64
    assert reference.pytorch.dtype == np.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.state[name]), name
