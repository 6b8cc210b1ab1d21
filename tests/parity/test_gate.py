"""The options of `check`, its report and its errors; bad files are in test_mutants."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.network.model import Architecture, Checkpoint, save_checkpoint
from mnist_batchnorm.network.onnx import strip_environment, trace
from mnist_batchnorm.parity import Gate, ParityReport, assert_parity, check
from tests.parity.conftest import Judge, judge_file
from tests.support.mutants.edit import change_one, nodes
from tests.support.parity_cases import OPSET, Case, dynamo_export

pytestmark = pytest.mark.usefixtures("few_passes")

CHECKS = ["file", "provenance", "structure", "weights", "re-export"]
CHECKS += ["probes", "invariance", "behaviour"]


def failed(report: ParityReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.status == "failed"}


# --- the report ---------------------------------------------------------------------------------


def test_every_check_passes_a_correct_file(judge: Judge, mlp: Case) -> None:
    report = judge(mlp.kept())
    assert [check.name for check in report.checks] == CHECKS
    assert {check.status for check in report.checks} == {"passed"}
    assert report.verdict == "parity"
    assert report.parity
    assert report.diagnoses == []


def test_every_check_runs_even_if_the_first_fails(judge: Judge, mlp: Case) -> None:
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


# --- options ----------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [False, True])
def test_required_form_of_batch_norm(judge: Judge, mlp: Case, folded: bool) -> None:
    graph, other = (mlp.folded(), mlp.kept()) if folded else (mlp.kept(), mlp.folded())
    assert judge(graph, folded=folded).parity
    assert "structure" in failed(judge(other, folded=folded))


def test_required_opset(judge: Judge, mlp: Case) -> None:
    assert judge(mlp.kept(), opset=OPSET).parity
    assert f"opset is {OPSET}, expected 18" in failed(judge(mlp.kept(), opset=18))["structure"]


@pytest.mark.parametrize("opset", [18, pytest.param(21, marks=pytest.mark.slow)])
def test_another_opset_passes(judge: Judge, mlp: Case, opset: int) -> None:
    report = judge(dynamo_export(mlp.model, mlp.inputs, fold=False, opset=opset))
    assert report.parity, report.table()


def test_names_matter_only_if_required(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    graph.graph.input[0].name = graph.graph.node[0].input[0] = "pixels"
    assert judge(graph, input_name=None).parity
    assert judge(graph, input_name="pixels").parity
    assert "pixels" in failed(judge(graph))["structure"]


def test_synthetic_inputs_alone_suffice(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    gate = Gate(mlp.weights, model=mlp.architecture)
    onnx.save(mlp.folded(), file)
    report = gate.check(file)
    assert report.parity, report.table()
    onnx.save(change_one(mlp.folded(), mlp.largest, lambda w: -w), file)
    assert not gate.check(file).parity


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


def test_the_number_of_threads_is_restored(judge: Judge, mlp: Case) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judge(mlp.kept())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_reads_weights_that_torch_saved(mlp: Case, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    torch.save(mlp.state, weights)
    gate = Gate(weights, model=mlp.architecture)
    assert gate.weights_sha256 == digest(weights)
    for name, tensor in gate.model.state_dict().items():
        assert torch.equal(tensor, mlp.state[name]), name


class ReplacedAfterReading:
    """A path whose file is replaced by other content as soon as it was read."""

    def __init__(self, path: Path, replacement: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.reads = path, 0
        read_bytes = Path.read_bytes

        def read_once(other: Path) -> bytes:
            content = read_bytes(other)
            if other == path:
                self.reads += 1
                path.write_bytes(replacement)
            return content

        monkeypatch.setattr(Path, "read_bytes", read_once)


@pytest.mark.parametrize("with_model", [False, True])
def test_hashes_are_those_of_the_judged_bytes_if_files_are_replaced(
    mlp: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_model: bool
) -> None:
    weights, file = tmp_path / "bn.safetensors", tmp_path / "bn.onnx"
    architecture = Architecture((784, 32, 32, 10), batch_norm=True)
    save_checkpoint(weights, Checkpoint(architecture, mlp.state, {}))
    onnx.save(mlp.kept(), file)
    expected = digest(weights), digest(file)
    other = save({**mlp.state, "linear1.bias": mlp.state["linear1.bias"] + 1})
    replaced = [
        ReplacedAfterReading(weights, other, monkeypatch),
        ReplacedAfterReading(file, b"no ONNX file", monkeypatch),
    ]
    report = Gate(weights, model=mlp.architecture if with_model else None).check(file)
    assert report.parity, report.table()
    assert (report.weights_sha256, report.onnx_sha256) == expected
    assert [path.reads for path in replaced] == [1, 1]


def test_assert_parity_raises_the_table(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(change_one(mlp.kept(), "bn1.running_mean", lambda m: m + 0.5), file)
    with pytest.raises(AssertionError, match=r"bn1\.running_mean"):
        assert_parity(file, mlp.weights, model=mlp.architecture, inputs=mlp.inputs[:64])


# --- unsupported networks -------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def saved(model: nn.Sequential, folder: Path) -> Path:
    """Write the weights of a network after one forward in train mode."""
    model.train()(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    weights = folder / "model.safetensors"
    save_file(model.eval().state_dict(), weights)
    return weights


def test_network_with_an_unsupported_layer_is_unproven_but_a_bad_file_still_fails(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Doubled(), nn.ReLU(), nn.Linear(8, 3))
    gate = Gate(saved(model, tmp_path), model=model)
    file = tmp_path / "model.onnx"
    graph = dynamo_export(model, np.zeros((2, 6), np.float32), fold=False)
    onnx.save(graph, file)
    report = gate.check(file)
    assert report.verdict == "unproven", report.table()
    assert not report.parity
    assert "Doubled" in report.table()
    onnx.save(change_one(graph, "0.weight", lambda w: w + 1e-3), file)
    assert gate.check(file).verdict == "no parity"


def test_batch_norm_without_gamma_and_beta(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3)
    )
    gate, file = Gate(saved(model, tmp_path), model=model), tmp_path / "model.onnx"
    for fold, graph in trace(model, (6,)).items():
        onnx.save(graph, file)
        report = gate.check(file, folded=fold)
        assert report.parity, report.table()


# --- provenance ---------------------------------------------------------------------------------

SAYS = {"weights": "1" * 64, "data": "2" * 64}


@pytest.fixture
def labeled(mlp: Case) -> onnx.ModelProto:
    """A graph that says what `SAYS` says, and nothing else."""
    graph = mlp.kept()
    strip_environment(graph)
    onnx.helper.set_model_props(graph, SAYS)
    return graph


def strictly(judge: Judge, graph: onnx.ModelProto) -> str:
    """What is wrong with a file's provenance, where nothing else is."""
    found = failed(judge(graph, provenance=SAYS, require_provenance=True))
    assert found.keys() <= {"provenance"}
    return found.get("provenance", "")


def test_provenance_complete(judge: Judge, labeled: onnx.ModelProto) -> None:
    assert strictly(judge, labeled) == ""


def test_provenance_may_be_absent_but_not_contradict(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    assert judge(graph, provenance=SAYS).parity
    onnx.helper.set_model_props(graph, SAYS | {"data": "3" * 64})
    assert "3333" in failed(judge(graph, provenance=SAYS))["provenance"]


def test_missing_required_provenance(judge: Judge, labeled: onnx.ModelProto) -> None:
    del labeled.metadata_props[0]
    assert "is missing" in strictly(judge, labeled)


def test_duplicate_provenance(judge: Judge, labeled: onnx.ModelProto) -> None:
    labeled.metadata_props.add().CopyFrom(labeled.metadata_props[0])
    assert not judge(labeled, provenance=SAYS).parity


def test_unexpected_metadata(judge: Judge, labeled: onnx.ModelProto) -> None:
    entry = labeled.metadata_props.add()
    entry.key, entry.value = "host", "build-7"
    assert "host" in strictly(judge, labeled)


def test_doc_strings_and_metadata_inside_the_graph(judge: Judge, labeled: onnx.ModelProto) -> None:
    labeled.graph.node[0].attribute[0].doc_string = "/home/someone/train.py"
    labeled.graph.node[0].metadata_props.add().key = "pkg.torch.onnx.stack_trace"
    problems = strictly(judge, labeled)
    assert "doc_string of AttributeProto" in problems
    assert "metadata_props of NodeProto" in problems


# --- errors ----------------------------------------------------------------------------


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
def test_unusable_checkpoint_is_a_user_error(
    make: Callable[[Case, Path], Path], mlp: Case, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.kept(), file)
    weights = make(mlp, tmp_path)
    with pytest.raises(UserError, match=weights.name):
        check(file, weights, model=mlp.architecture)


def test_missing_file_is_a_user_error(mlp: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.onnx"):
        judge_file(tmp_path / "absent.onnx", mlp)


def test_inputs_of_another_shape_are_a_user_error(mlp: Case, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(mlp.kept(), file)
    with pytest.raises(UserError, match="28"):
        check(file, mlp.weights, model=mlp.architecture, inputs=mlp.inputs.reshape(-1, 28, 28))


def test_input_shape_is_required_if_the_first_layer_is_not_linear(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    file, weights = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    save_file(model.state_dict(), weights)
    onnx.save(dynamo_export(model, np.zeros((2, 1, 6, 6), np.float32), fold=False), file)
    with pytest.raises(UserError, match="input_shape"):
        check(file, weights, model=model)
    report = check(file, weights, model=model, input_shape=(1, 6, 6))
    assert report.parity, report.table()
