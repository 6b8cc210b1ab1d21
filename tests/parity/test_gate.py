"""What `check` is told, what it reports, and whom it refuses; bad files are in test_mutants."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.network.model import Architecture, Checkpoint, save_checkpoint
from mnist_batchnorm.network.onnx import strip_circumstance
from mnist_batchnorm.parity import ParityReport, assert_parity, check
from mnist_batchnorm.stages.export import export
from tests.parity.conftest import Judge, judge_file
from tests.support.mutants.edit import change_one, nodes
from tests.support.parity_cases import OPSET, Case, dynamo_export

pytestmark = pytest.mark.usefixtures("few_passes")

CHECKS = ["file", "provenance", "structure", "weights", "re-export"]
CHECKS += ["probes", "invariance", "behaviour"]


def failed(report: ParityReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.status == "failed"}


# --- the report ---------------------------------------------------------------------------------


def test_every_check_passes_an_honest_file(judge: Judge, mlp: Case) -> None:
    report = judge(mlp.kept())
    assert [check.name for check in report.checks] == CHECKS
    assert {check.status for check in report.checks} == {"passed"}
    assert report.verdict == "parity"
    assert report.parity
    assert report.diagnoses == []


def test_every_check_runs_though_the_first_fails(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    graph.graph.input[0].name = "x"  # and so the first node reads nothing
    report = judge(graph)
    assert [check.name for check in report.checks] == CHECKS
    assert {"file", "structure"} <= failed(report).keys()


def test_the_same_file_gives_the_same_report(judge: Judge, mlp: Case) -> None:
    assert judge(mlp.folded()).to_json() == judge(mlp.folded()).to_json()


def test_report_names_both_files_by_their_hash(judge: Judge, mlp: Case, tmp_path: Path) -> None:
    report = judge(mlp.folded())
    assert report.onnx_sha256 == digest(tmp_path / "candidate.onnx")
    assert report.weights_sha256 == digest(mlp.weights)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["onnx"]["sha256"] == report.onnx_sha256
    assert content["verdict"] == "parity"
    assert [check["name"] for check in content["checks"]] == CHECKS


def test_table_of_a_bad_file_fits_a_screen_and_names_the_mistake(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    for node in nodes(graph, "BatchNormalization"):
        (epsilon,) = (a for a in node.attribute if a.name == "epsilon")
        epsilon.f = 1e-3
    lines = judge(graph).table().splitlines()
    assert "NO PARITY" in lines[0]
    assert "0.001" in lines[1]
    assert "1e-05" in lines[1]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 200


# --- what it is told ----------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [False, True])
def test_the_form_that_is_demanded(judge: Judge, mlp: Case, folded: bool) -> None:
    graph, other = (mlp.folded(), mlp.kept()) if folded else (mlp.kept(), mlp.folded())
    assert judge(graph, folded=folded).parity
    assert "structure" in failed(judge(other, folded=folded))


def test_the_opset_that_is_demanded(judge: Judge, mlp: Case) -> None:
    assert judge(mlp.kept(), opset=OPSET).parity
    assert f"opset is {OPSET}, expected 18" in failed(judge(mlp.kept(), opset=18))["structure"]


@pytest.mark.parametrize("opset", [18, 21])
def test_another_opset_is_honest(judge: Judge, mlp: Case, opset: int) -> None:
    report = judge(dynamo_export(mlp.model, mlp.inputs, fold=False, opset=opset))
    assert report.parity, report.table()


def test_names_count_only_where_they_are_told(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    graph.graph.input[0].name = graph.graph.node[0].input[0] = "pixels"
    assert judge(graph, input_name=None).parity
    assert judge(graph, input_name="pixels").parity
    assert "pixels" in failed(judge(graph))["structure"]


def test_synthetic_inputs_alone_still_tell(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.folded(), file)
    report = check(file, mlp.weights, model=mlp.architecture)
    assert report.parity, report.table()
    onnx.save(change_one(mlp.folded(), mlp.largest, lambda w: -w), file)
    assert not check(file, mlp.weights, model=mlp.architecture).parity


def test_the_models_own_weights_are_ignored(judge: Judge, mlp: Case) -> None:
    """Those of the file count; the model that training left may be another by now."""
    before = {k: v.clone() for k, v in mlp.architecture.state_dict().items()}
    assert not torch.equal(before["linear1.weight"], mlp.state["linear1.weight"])
    mlp.architecture.train()
    try:
        assert judge(mlp.kept()).parity
        assert mlp.architecture.training
    finally:
        mlp.architecture.eval()
    for name, tensor in mlp.architecture.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_threads_are_as_before(judge: Judge, mlp: Case) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judge(mlp.kept())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_weights_that_torch_saved(mlp: Case, tmp_path: Path) -> None:
    weights, file = tmp_path / "model.pt", tmp_path / "model.onnx"
    torch.save(mlp.state, weights)
    onnx.save(mlp.folded(), file)
    assert check(file, weights, model=mlp.architecture, inputs=mlp.inputs).parity


@pytest.mark.parametrize("name", ["bn.onnx", "bn-folded.onnx"])
def test_checkpoint_of_this_project_needs_no_model(mlp: Case, tmp_path: Path, name: str) -> None:
    weights, file = tmp_path / "bn.safetensors", tmp_path / name
    provenance = {"variant": "bn", "train_sha256": "0" * 64, "params": {}, "device": "cpu"}
    architecture = Architecture((784, 32, 32, 10), batch_norm=True)
    save_checkpoint(weights, Checkpoint(architecture, mlp.state, provenance))
    file.write_bytes(export("bn", weights, OPSET)[name])
    report = check(file, weights)
    assert report.parity, report.table()


def test_assert_parity(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.kept(), file)
    options = {"model": mlp.architecture, "inputs": mlp.inputs}
    assert assert_parity(file, mlp.weights, **options).parity
    onnx.save(change_one(mlp.kept(), "bn1.running_mean", lambda m: m + 0.5), file)
    with pytest.raises(AssertionError, match=r"bn1\.running_mean"):
        assert_parity(file, mlp.weights, **options)


# --- networks that it does not know -------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[nn.Sequential, Path]:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Doubled(), nn.ReLU(), nn.Linear(8, 3))
    model.train()(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    weights = tmp_path / "foreign.safetensors"
    save_file(model.eval().state_dict(), weights)
    return model, weights


def test_layer_that_is_not_known_is_named(
    foreign: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    model, weights = foreign
    file = tmp_path / "foreign.onnx"
    onnx.save(dynamo_export(model, np.zeros((2, 6), np.float32), fold=False), file)
    report = check(file, weights, model=model)
    assert report.verdict == "unproven", report.table()
    assert not report.parity
    assert "Doubled" in report.table()
    with pytest.raises(AssertionError, match="Doubled"):
        assert_parity(file, weights, model=model)


@pytest.mark.parametrize("fold", [False, True])
def test_batch_norm_without_gamma_and_beta(tmp_path: Path, fold: bool) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3)
    )
    model.train()(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    weights, file = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    save_file(model.eval().state_dict(), weights)
    onnx.save(dynamo_export(model, np.zeros((2, 6), np.float32), fold=fold), file)
    assert_parity(file, weights, model=model)


def test_bad_file_of_an_unknown_network_is_still_stopped(
    foreign: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    model, weights = foreign
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("0.weight")[3, 2] += 1e-3
    file = tmp_path / "foreign.onnx"
    onnx.save(dynamo_export(other, np.zeros((2, 6), np.float32), fold=False), file)
    assert check(file, weights, model=model).verdict == "no parity"


# --- provenance ---------------------------------------------------------------------------------

SAYS = {"weights": "1" * 64, "data": "2" * 64}


@pytest.fixture
def labelled(mlp: Case) -> onnx.ModelProto:
    """A graph that says what `SAYS` says, and nothing else."""
    graph = mlp.kept()
    strip_circumstance(graph)
    onnx.helper.set_model_props(graph, SAYS)
    return graph


def strictly(judge: Judge, graph: onnx.ModelProto) -> str:
    """What is wrong with a file's provenance, where nothing else is."""
    found = failed(judge(graph, provenance=SAYS, require_provenance=True))
    assert found.keys() <= {"provenance"}
    return found.get("provenance", "")


def test_provenance_complete(judge: Judge, labelled: onnx.ModelProto) -> None:
    assert strictly(judge, labelled) == ""


def test_provenance_may_be_absent_but_not_contradict(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    assert judge(graph, provenance=SAYS).parity
    onnx.helper.set_model_props(graph, SAYS | {"data": "3" * 64})
    assert "3333" in failed(judge(graph, provenance=SAYS))["provenance"]


def test_provenance_that_is_required(judge: Judge, labelled: onnx.ModelProto) -> None:
    del labelled.metadata_props[0]
    assert "is missing" in strictly(judge, labelled)


def test_provenance_said_twice(judge: Judge, labelled: onnx.ModelProto) -> None:
    labelled.metadata_props.add().CopyFrom(labelled.metadata_props[0])
    assert not judge(labelled, provenance=SAYS).parity


def test_metadata_that_nobody_expects(judge: Judge, labelled: onnx.ModelProto) -> None:
    entry = labelled.metadata_props.add()
    entry.key, entry.value = "host", "build-7"
    assert "host" in strictly(judge, labelled)


def test_remarks_inside_the_graph(judge: Judge, labelled: onnx.ModelProto) -> None:
    labelled.graph.node[0].attribute[0].doc_string = "/home/someone/train.py"
    labelled.graph.node[0].metadata_props.add().key = "pkg.torch.onnx.stack_trace"
    problems = strictly(judge, labelled)
    assert "doc_string of AttributeProto" in problems
    assert "metadata_props of NodeProto" in problems


# --- whom it refuses ----------------------------------------------------------------------------


def other_widths(mlp: Case, folder: Path) -> Path:
    path = folder / "other.safetensors"
    save_file(Architecture((784, 16, 10), batch_norm=True).build().state_dict(), path)
    return path


def half(mlp: Case, folder: Path) -> Path:
    path = folder / "half.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in mlp.state.items()}, path)
    return path


def text(mlp: Case, folder: Path) -> Path:
    path = folder / "text.safetensors"
    path.write_text("no weights\n")
    return path


def broken_pickle(mlp: Case, folder: Path) -> Path:
    path = folder / "broken.pt"
    torch.save(mlp.state, path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def absent(mlp: Case, folder: Path) -> Path:
    return folder / "absent.safetensors"


@pytest.mark.parametrize("make", [other_widths, half, text, broken_pickle, absent])
def test_checkpoint_that_cannot_be_judged_by(
    make: Callable[[Case, Path], Path], mlp: Case, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.kept(), file)
    weights = make(mlp, tmp_path)
    with pytest.raises(UserError, match=weights.name):
        check(file, weights, model=mlp.architecture)


def test_file_that_is_missing_is_the_callers_mistake(mlp: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.onnx"):
        judge_file(tmp_path / "absent.onnx", mlp)


def test_inputs_of_another_shape_are_the_callers_mistake(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.kept(), file)
    with pytest.raises(UserError, match="28"):
        check(file, mlp.weights, model=mlp.architecture, inputs=mlp.inputs.reshape(-1, 28, 28))


def test_shape_that_no_layer_tells(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    file, weights = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    save_file(model.state_dict(), weights)
    onnx.save(dynamo_export(model, np.zeros((2, 1, 6, 6), np.float32), fold=False), file)
    with pytest.raises(UserError, match="input_shape"):
        check(file, weights, model=model)
    report = check(file, weights, model=model, input_shape=(1, 6, 6))
    assert report.parity, report.table()
