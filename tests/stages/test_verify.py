import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.network.model import Checkpoint, load_checkpoint, save_checkpoint
from mnist_batchnorm.network.onnx import provenance
from mnist_batchnorm.parity.report import CHECKS, Check
from mnist_batchnorm.stages.export import export
from mnist_batchnorm.stages.verify import gate_of
from tests.conftest import MnistBn, Outcome
from tests.support.gate import few_passes, reuse_function_registry

__all__ = ["few_passes"]

reuse_function_registry()


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path]) -> dict[str, bytes]:
    return {
        name: content
        for variant, weights in checkpoints.items()
        for name, content in export(variant, weights, opset=20).items()
    }


@pytest.fixture
def ready(
    project: Path, prepared: Path, checkpoints: dict[str, Path], exported: dict[str, bytes]
) -> Path:
    """A project in which everything before verify has run."""
    shutil.copytree(checkpoints["bn"].parent, project / "models")
    (project / "data/prepared").mkdir(parents=True)
    shutil.copy(prepared / "test.safetensors", project / "data/prepared")
    for name, content in exported.items():
        (project / "models" / name).write_bytes(content)
    return project


def parity(project: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project / "reports/parity.json").read_text())
    return content


def error_rows(project: Path) -> list[dict[str, str]]:
    with (project / "reports/parity/errors.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_honest_files(ready: Path, mnist_bn: MnistBn) -> None:
    outcome = mnist_bn("verify")
    assert outcome.status == 0, outcome.out
    content = parity(ready)
    assert content["parity"] is True
    assert list(content["graphs"]) == list(GRAPHS)
    rows = error_rows(ready)
    assert [row["image"] for row in rows] == [str(i) for i in range(500)]
    for name, graph in content["graphs"].items():
        assert f"models/{name}: parity" in outcome.out
        assert graph["weights"]["path"] == f"models/{GRAPHS[name].variant}.safetensors"
        checks = {check["name"]: check for check in graph["checks"]}
        statistics = 128 if GRAPHS[name].variant == "bn" else 0  # mean and variance of 2 x 32 units
        assert checks["weights"]["evidence"]["running_statistics"] == statistics
        assert max(float(row[name]) for row in rows) == pytest.approx(
            graph["summary"]["max_relative_error"], rel=1e-3
        )


@pytest.mark.usefixtures("few_passes")
def test_swapped_files(ready: Path, mnist_bn: MnistBn) -> None:
    kept, folded = ready / "models/bn.onnx", ready / "models/bn-folded.onnx"
    content = kept.read_bytes()
    kept.write_bytes(folded.read_bytes())
    folded.write_bytes(content)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "bn1 is not kept as BatchNormalization" in outcome.out
    assert "bn1 is kept as BatchNormalization, expected to be folded" in outcome.out
    assert "models/bn.onnx, models/bn-folded.onnx does not compute" in outcome.err


# --- plain.onnx, the network without batch norm --------------------------------------------------

JudgePlain = Callable[[bytes], dict[str, Check]]


@pytest.fixture(scope="module")
def judge_plain(
    checkpoints: dict[str, Path],
    prepared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    few_passes: None,
) -> JudgePlain:
    """Judge plain.onnx as the stage does; return the gate's checks by name."""
    weights, path = checkpoints["plain"], tmp_path_factory.mktemp("plain") / "plain.onnx"
    checkpoint = load_checkpoint(weights)
    gate = gate_of(weights, checkpoint, load_split(prepared / "test.safetensors"))
    expected = provenance(checkpoint)

    def judge(content: bytes) -> dict[str, Check]:
        path.write_bytes(content)
        report = gate.check(path, opset=20, folded=False, provenance=expected)
        return {check.name: check for check in report.checks}

    return judge


def failed(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.detail for name, check in checks.items() if check.status == "failed"}


def test_report_on_plain_does_not_mention_batch_norm(
    judge_plain: JudgePlain, exported: dict[str, bytes]
) -> None:
    checks = judge_plain(exported["plain.onnx"])
    assert list(checks) == list(CHECKS)
    assert {check.status for check in checks.values()} == {"passed"}
    assert "BatchNormalization" not in checks["structure"].evidence["operators"]
    assert checks["weights"].detail.endswith(
        "numbers equal, bit for bit; no running statistics: the network has no batch norm"
    )
    assert checks["weights"].evidence["running_statistics"] == 0
    assert "batch norm" not in checks["re-export"].detail


def smuggle(graph: onnx.ModelProto, training_mode: int, mean: float) -> None:
    """Put a batch norm before the first ReLU that, in eval mode, changes what it gets by -mean."""
    (relu, *_) = (node for node in graph.graph.node if node.op_type == "Relu")
    names = [f"bn1.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    for name, value in zip(names, (1, 0, mean, 1), strict=True):
        array = np.full(32, value, dtype=np.float32)
        graph.graph.initializer.append(numpy_helper.from_array(array, name))
    outputs = ["smuggled", *(["mean", "variance"] if training_mode else [])]
    node = onnx.helper.make_node(
        "BatchNormalization",
        [relu.input[0], *names],
        outputs,
        epsilon=0.0,
        training_mode=training_mode,
    )
    relu.input[0] = "smuggled"
    graph.graph.node.insert(1, node)


@pytest.mark.parametrize(
    ("training_mode", "mean", "also"),
    [
        pytest.param(0, 0.0, set(), id="one that changes nothing"),
        pytest.param(0, 0.5, {"probes"}, id="one that shifts"),
        pytest.param(1, 0.0, {"probes", "invariance"}, id="one in training mode"),
    ],
)
def test_plain_with_a_batch_norm_in_it(
    judge_plain: JudgePlain,
    exported: dict[str, bytes],
    training_mode: int,
    mean: float,
    also: set[str],
) -> None:
    graph = onnx.load_from_string(exported["plain.onnx"])
    smuggle(graph, training_mode, mean)
    onnx.checker.check_model(graph, full_check=True)
    found = failed(judge_plain(graph.SerializeToString()))
    assert "is additional: the network has no BatchNormalization there" in found["structure"]
    assert found.keys() >= {"structure", "re-export", *also}


def test_plain_of_other_weights(
    judge_plain: JudgePlain, exported: dict[str, bytes], trained_plain: Checkpoint
) -> None:
    """A run that began otherwise, its file honest but for claiming this checkpoint."""
    graph = onnx.load_from_string(exported["plain.onnx"])
    other = trained_plain.architecture.build(seed=1).state_dict()
    for tensor in graph.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(other[tensor.name].numpy(), tensor.name))
    found = failed(judge_plain(graph.SerializeToString()))
    assert found.keys() == {"weights", "re-export", "probes", "behaviour"}


def test_batch_norm_folded_under_the_name_of_plain(
    judge_plain: JudgePlain, exported: dict[str, bytes]
) -> None:
    """Operator for operator plain's graph, so only numbers and provenance tell."""
    found = failed(judge_plain(exported["bn-folded.onnx"]))
    assert "structure" not in found
    assert found.keys() >= {"provenance", "weights", "re-export", "probes"}


@pytest.mark.usefixtures("few_passes")
def test_bad_files_stop_the_stage_and_leave_the_others_judged(
    ready: Path, mnist_bn: MnistBn
) -> None:
    plain, kept = ready / "models/plain.onnx", ready / "models/bn.onnx"
    graph = onnx.load(plain)
    smuggle(graph, training_mode=0, mean=0.0)
    plain.write_bytes(graph.SerializeToString())
    graph = onnx.load(kept)
    graph.graph.initializer[0].data_type = 999  # ONNX Runtime cannot load it
    kept.write_bytes(graph.SerializeToString())
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert outcome.err == (
        "FAILED: models/bn.onnx does not compute what models/bn.safetensors computes; "
        "models/plain.onnx does not compute what models/plain.safetensors computes; "
        "every check with its evidence is in reports/parity.json\n"
    )
    content = parity(ready)
    assert content["parity"] is False
    assert {name: graph["verdict"] for name, graph in content["graphs"].items()} == {
        "bn.onnx": "no parity",
        "bn-folded.onnx": "parity",
        "plain.onnx": "no parity",
    }
    assert content["graphs"]["bn.onnx"]["summary"]["max_relative_error"] is None
    assert {row["bn.onnx"] for row in error_rows(ready)} == {""}
    assert list(content["goldens"]["logits"]) == ["bn-folded.onnx"]


def test_networks_that_fail_are_named_with_their_checkpoints(
    ready: Path, mnist_bn: MnistBn
) -> None:
    for name in GRAPHS:
        (ready / "models" / name).write_bytes(b"no ONNX file")
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert outcome.err.startswith(
        "FAILED: models/bn.onnx, models/bn-folded.onnx does not compute what "
        "models/bn.safetensors computes; "
        "models/plain.onnx does not compute what models/plain.safetensors computes; every check"
    )


@pytest.mark.parametrize(("variant", "taken_for"), [("bn", "plain"), ("plain", "bn")])
def test_checkpoint_of_the_other_network_is_a_user_error(
    ready: Path, mnist_bn: MnistBn, variant: str, taken_for: str
) -> None:
    """Else plain.onnx could have batch norm, and be equal to its checkpoint."""
    models = ready / "models"
    shutil.copy(models / f"{variant}.safetensors", models / f"{taken_for}.safetensors")
    outcome = mnist_bn("verify")
    assert outcome.status == 2
    assert f"models/{taken_for}.safetensors holds the network with" in outcome.err
    assert not (ready / "reports").exists()


# --- invalid files ---------------------------------------------------------------------------


@pytest.mark.usefixtures("few_passes")
def test_stage_requires_metadata_and_possible_weights(ready: Path, mnist_bn: MnistBn) -> None:
    path, weights = ready / "models/plain.onnx", ready / "models/bn.safetensors"
    graph = onnx.load(path)
    del graph.metadata_props[:]
    path.write_bytes(graph.SerializeToString())
    checkpoint = load_checkpoint(weights)
    checkpoint.state["linear1.bias"][0] = torch.nan
    save_checkpoint(weights, checkpoint)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "mnist_batchnorm.input is missing" in outcome.out
    assert "the checkpoint's own linear1.bias is not possible" in outcome.out
    failures = {
        name: sorted(check["name"] for check in graph["checks"] if check["status"] == "failed")
        for name, graph in parity(ready)["graphs"].items()
    }
    assert failures["plain.onnx"] == ["provenance"]
    assert {"provenance", "weights"} <= set(failures["bn.onnx"]) & set(failures["bn-folded.onnx"])
    judged = mnist_bn("verify", "--onnx", str(path), "--weights", "models/plain.safetensors")
    assert judged.status == 0, judged.out  # without the stage, metadata is optional


@pytest.mark.usefixtures("few_passes")
def test_hashes_are_those_of_the_judged_bytes(
    ready: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        *(ready / "models" / name for name in (*GRAPHS, "bn.safetensors", "plain.safetensors")),
        ready / "data/prepared/test.safetensors",
    ]
    before = {path: sha256(path.read_bytes()).hexdigest() for path in files}
    reads: Counter[Path] = Counter()
    read_bytes = Path.read_bytes

    def read_and_replace(path: Path) -> bytes:
        content = read_bytes(path)
        if path.resolve() in before:
            reads[path.resolve()] += 1
            path.write_bytes(b"replaced")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_replace)
    outcome = mnist_bn("verify")
    assert outcome.status == 0, outcome.out
    assert reads == dict.fromkeys(files, 1)
    content = parity(ready)
    judged = [content["data"]]
    for graph in content["graphs"].values():
        judged += [graph["onnx"], graph["weights"]]
    for file in judged:
        assert file["sha256"] == before[ready / file["path"]]


@pytest.mark.parametrize("name", ["bn.onnx", "plain.onnx", "bn.safetensors", "plain.safetensors"])
def test_stage_without_a_file(ready: Path, mnist_bn: MnistBn, name: str) -> None:
    (ready / "models" / name).unlink()
    outcome = mnist_bn("verify")
    assert outcome.status == 2
    assert "dvc repro" in outcome.err
    assert not (ready / "reports").exists()


@pytest.mark.usefixtures("few_passes")
class TestAnyTwoFiles:
    """``mnist-bn verify --onnx F --weights F``."""

    @pytest.fixture
    def judge(self, ready: Path, mnist_bn: MnistBn) -> Callable[..., Outcome]:
        def run(onnx_file: str, *options: str, weights: str = "models/bn.safetensors") -> Outcome:
            return mnist_bn("verify", "--onnx", onnx_file, "--weights", weights, *options)

        return run

    def test_parity(self, judge: Callable[..., Outcome], ready: Path) -> None:
        outcome = judge("models/bn-folded.onnx")
        assert outcome.status == 0, outcome.out
        assert outcome.out.startswith("models/bn-folded.onnx: parity\n")
        assert all(line.startswith("  ") for line in outcome.out.splitlines()[1:])
        assert len(outcome.out.splitlines()) < 24, "one screen"
        assert not (ready / "reports").exists()

    def test_json_without_the_test_images(self, judge: Callable[..., Outcome], ready: Path) -> None:
        shutil.rmtree(ready / "data")
        outcome = judge("models/bn.onnx", "--json")
        assert outcome.status == 0, outcome.out
        assert "judged by synthetic inputs alone" in outcome.err
        report = json.loads(outcome.out)
        assert report["verdict"] == "parity"
        content = (ready / "models/bn.onnx").read_bytes()
        assert report["onnx"] == {"path": "models/bn.onnx", "sha256": sha256(content).hexdigest()}
        assert [check["name"] for check in report["checks"]] == list(CHECKS)

    def test_mistake_is_named(self, judge: Callable[..., Outcome], ready: Path) -> None:
        graph = onnx.load(ready / "models/bn.onnx")
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
        (ready / "frozen.onnx").write_bytes(graph.SerializeToString())
        outcome = judge("frozen.onnx")
        assert outcome.status == 1
        head, likely, *_ = outcome.out.splitlines()
        assert head == "frozen.onnx: NO PARITY"
        assert likely == "  likely: batch axis fixed at 32 (image)"
        assert outcome.err.startswith("FAILED: frozen.onnx does not compute")

    @pytest.mark.parametrize("keep", [0, 1, 1000])
    def test_part_of_a_file(self, judge: Callable[..., Outcome], ready: Path, keep: int) -> None:
        (ready / "part.onnx").write_bytes((ready / "models/bn.onnx").read_bytes()[:keep])
        outcome = judge("part.onnx")
        assert outcome.status == 1
        assert outcome.out.startswith("part.onnx: NO PARITY")

    def test_missing_file(self, judge: Callable[..., Outcome]) -> None:
        outcome = judge("absent.onnx")
        assert outcome.status == 2
        assert "absent.onnx cannot be read" in outcome.err

    def test_unreadable_checkpoint(self, judge: Callable[..., Outcome], ready: Path) -> None:
        (ready / "part.safetensors").write_bytes(b"part")
        outcome = judge("models/bn.onnx", weights="part.safetensors")
        assert outcome.status == 2
        assert "part.safetensors is not a readable safetensors file" in outcome.err

    def test_unknown_architecture(self, judge: Callable[..., Outcome], ready: Path) -> None:
        save_file({"weight": torch.zeros(3)}, ready / "foreign.safetensors")
        outcome = judge("models/bn.onnx", weights="foreign.safetensors")
        assert outcome.status == 2
        assert "foreign.safetensors is not a checkpoint of this project" in outcome.err

    @pytest.mark.parametrize(
        "options", [["--onnx", "a"], ["--weights", "a"], ["--json"], ["--onnx", "a", "--json"]]
    )
    def test_incomplete_options(self, ready: Path, mnist_bn: MnistBn, options: list[str]) -> None:
        outcome = mnist_bn("verify", *options)
        assert outcome.status == 2
        assert "--onnx and --weights go together" in outcome.err
