"""The gate passes honest exports and stops the four classic bad ones, each for its reason."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mnist_batchnorm.batchnorm import batch_norm_layers
from mnist_batchnorm.dataset import network_input
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.export import export_onnx
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity import GraphReport, Reference, check_graph
from mnist_batchnorm.parity.outputs import relative_error
from tests.parity.conftest import (
    BATCH_SIZES,
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
        report = judge(folded)
        assert report.parity, failed(report)

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
        assert f"{name}[" in failed(judge(folded))["weights"]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_folded_number_not_finite(
        self, judge: Judge, folded: onnx.ModelProto, value: float
    ) -> None:
        set_tensor(folded, "linear1.weight", 0, value)
        problems = failed(judge(folded))
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
        assert "linear1.weight: stored outside the file" in problems["weights"]
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

    def test_not_onnx(self, judge: Judge) -> None:
        assert "file" in failed(judge(b"<html>not found</html>"))


class TestProvenance:
    def run(
        self, path: Path, checkpoint: Checkpoint, weights: Path, reference: Reference
    ) -> dict[str, str]:
        return failed(check_graph(path, weights, checkpoint, reference, BATCH_SIZES, LIMIT))

    def test_missing(
        self,
        tmp_path: Path,
        kept: onnx.ModelProto,
        checkpoint: Checkpoint,
        weights: Path,
        reference: Reference,
    ) -> None:
        path = tmp_path / "bn.onnx"
        onnx.save(kept, path)
        problems = self.run(path, checkpoint, weights, reference)
        assert list(problems) == ["provenance"]
        assert "does not say which checkpoint" in problems["provenance"]

    def test_other_checkpoint(
        self,
        tmp_path: Path,
        kept: onnx.ModelProto,
        checkpoint: Checkpoint,
        weights: Path,
        reference: Reference,
    ) -> None:
        entry = kept.metadata_props.add()
        entry.key, entry.value = "mnist_batchnorm.weights_sha256", "f" * 64
        path = tmp_path / "bn.onnx"
        onnx.save(kept, path)
        problems = self.run(path, checkpoint, weights, reference)
        assert "made from checkpoint ffffffffffff" in problems["provenance"]

    def test_missing_file_is_the_callers_mistake(
        self, tmp_path: Path, checkpoint: Checkpoint, weights: Path, reference: Reference
    ) -> None:
        with pytest.raises(UserError, match=r"no-such\.onnx"):
            self.run(tmp_path / "no-such.onnx", checkpoint, weights, reference)


def test_relative_error_is_of_the_rows_largest_logit() -> None:
    exact = np.array([[1e-9, 10.0], [1.0, 2.0], [1.0, 2.0]])
    logits = np.array([[1e-6, 10.0], [1.0, 2.5], [np.nan, 2.0]], dtype=np.float32)
    error = relative_error(logits, exact)
    assert error[0] == pytest.approx(1e-7, rel=1e-2)
    assert error[1] == 0.25
    assert error[2] == np.inf


def test_reference_leaves_the_model_as_it_was(checkpoint: Checkpoint) -> None:
    model = checkpoint.model()
    images = network_input(random_images(3, 8))
    reference = Reference.compute(model, images, np.zeros(8, np.uint8))
    assert reference.exact.dtype == np.float64
    assert reference.pytorch.dtype == np.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.state[name]), name
