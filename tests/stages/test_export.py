import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.params import ExportParams
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS
from mnist_batchnorm.network.model import Architecture, Checkpoint, load_checkpoint, save_checkpoint
from mnist_batchnorm.network.onnx import export_onnx
from mnist_batchnorm.stages.export import export
from tests.conftest import MnistBn

OPSET = 20
ALLOWED = ExportParams.model_json_schema()["properties"]["opset"]


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Path]) -> dict[str, bytes]:
    return {
        name: content
        for variant, weights in checkpoints.items()
        for name, content in export(variant, weights, OPSET).items()
    }


@pytest.fixture(params=GRAPHS)
def name(request: pytest.FixtureRequest) -> str:
    """Each graph in turn."""
    return str(request.param)


@pytest.fixture
def content(exported: dict[str, bytes], name: str) -> bytes:
    """Its bytes."""
    return exported[name]


@pytest.fixture
def origin(checkpoints: dict[str, Path], name: str) -> Path:
    """The checkpoint that it is made from."""
    return checkpoints[GRAPHS[name].variant]


@pytest.fixture
def proto(content: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(content)


def logits(content: bytes, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": inputs})[0])


# --- the graphs ---------------------------------------------------------------------------------


def test_interface_is_named_and_its_batch_axis_symbolic(proto: onnx.ModelProto) -> None:
    def interface(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = value.type.tensor_type
        shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        return value.name, tensor.elem_type, shape

    float32 = onnx.TensorProto.FLOAT
    assert [interface(value) for value in proto.graph.input] == [("image", float32, ["batch", 784])]
    assert [interface(value) for value in proto.graph.output] == [
        ("logits", float32, ["batch", 10])
    ]
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_graph_computes_what_the_network_computes(
    content: bytes, origin: Path, prepared: Path, n: int
) -> None:
    inputs = network_input(load_split(prepared / "test.safetensors").images[:n])
    with torch.no_grad():
        expected = load_checkpoint(origin).model()(torch.from_numpy(inputs)).numpy()
    error = np.abs(logits(content, inputs) - expected).max(axis=1)
    # relative to the row's largest logit; 5e-6 is what the gate allows
    assert (error / np.abs(expected).max(axis=1)).max() < 5e-6


def test_bn_onnx_keeps_its_batch_norm_and_holds_the_weights_bit_for_bit(
    exported: dict[str, bytes], trained: Checkpoint
) -> None:
    proto = onnx.load_from_string(exported["bn.onnx"])
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    assert [list(node.input[1:]) for node in nodes] == [
        [f"bn{i}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        for i in (1, 2)
    ]
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.get("training_mode", 0) == 0
        assert attributes["epsilon"] == np.float32(1e-5)
        assert len(node.output) == 1
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    expected = {k: v.numpy() for k, v in trained.state.items() if "num_batches" not in k}
    assert held.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(held[name].view(np.uint32), array.view(np.uint32))


def test_bn_folded_onnx_has_no_batch_norm_left(
    exported: dict[str, bytes], trained: Checkpoint
) -> None:
    proto = onnx.load_from_string(exported["bn-folded.onnx"])
    assert [node.op_type for node in proto.graph.node] == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for i in (1, 2):
        state = {
            k: trained.state[f"bn{i}.{k}"].double().numpy()
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        linear = {k: trained.state[f"linear{i}.{k}"].double().numpy() for k in ("weight", "bias")}
        scale = state["weight"] / np.sqrt(state["running_var"] + 1e-5)
        np.testing.assert_allclose(
            held[f"linear{i}.weight"], linear["weight"] * scale[:, None], rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            held[f"linear{i}.bias"],
            (linear["bias"] - state["running_mean"]) * scale + state["bias"],
            rtol=1e-4,
            atol=1e-6,
        )


def test_plain_onnx_has_no_batch_norm_and_holds_the_weights_bit_for_bit(
    exported: dict[str, bytes], trained_plain: Checkpoint
) -> None:
    proto = onnx.load_from_string(exported["plain.onnx"])
    assert [node.op_type for node in proto.graph.node] == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert {name: array.tobytes() for name, array in held.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in trained_plain.state.items()
    }


def test_other_widths_and_the_plain_network_export_too() -> None:
    model = Architecture((20, 6, 3), batch_norm=False).build(1).eval()
    content = export_onnx(model, (20,), OPSET)[False].SerializeToString()
    inputs = np.random.default_rng(0).random((5, 20), dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(logits(content, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("opset", range(ALLOWED["minimum"], ALLOWED["maximum"] + 1))
def test_every_opset_that_params_allow_exports_and_runs(
    opset: int, variant: str, checkpoints: dict[str, Path]
) -> None:
    weights = checkpoints[variant]
    inputs = np.random.default_rng(0).random((7, 784), dtype=np.float32)
    with torch.no_grad():
        expected = load_checkpoint(weights).model()(torch.from_numpy(inputs)).numpy()
    for content in export(variant, weights, opset).values():
        (used,) = onnx.load_from_string(content).opset_import
        assert used.version == opset
        np.testing.assert_allclose(logits(content, inputs), expected, rtol=1e-4, atol=1e-4)


# --- nothing but content ------------------------------------------------------------------------


def test_one_file_without_external_data(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT
        assert not tensor.external_data


def test_nothing_of_this_machine_is_inside(content: bytes, proto: onnx.ModelProto) -> None:
    for folder in (Path.cwd(), Path(sys.prefix), Path.home(), Path(tempfile.gettempdir())):
        assert os.fsencode(folder) + b"/" not in content
    assert b".py" not in content
    assert b"pkg." not in content
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        assert not part.metadata_props
        assert not part.doc_string
    assert not proto.doc_string
    assert len(proto.functions) == 0


def test_provenance_is_what_made_the_model(proto: onnx.ModelProto, origin: Path) -> None:
    says = load_checkpoint(origin).provenance
    params = json.dumps(says["params"], sort_keys=True).encode()
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        "mnist_batchnorm.weights_sha256": hashlib.sha256(origin.read_bytes()).hexdigest(),
        "mnist_batchnorm.train_data_sha256": says["train_sha256"],
        "mnist_batchnorm.train_params_sha256": hashlib.sha256(params).hexdigest(),
        "mnist_batchnorm.input": "float32 [batch, 784], pixel / 255, rows top to bottom",
        "mnist_batchnorm.output": "float32 [batch, 10], one logit a digit, no softmax",
    }


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(
    checkpoints: dict[str, Path], exported: dict[str, bytes], tmp_path: Path
) -> None:
    """In another folder, with other hash seeds; the checkpoints too."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mnist_batchnorm.stages.export import export\n"
        "from mnist_batchnorm.network.model import load_checkpoint, save_checkpoint\n"
        "for weights in map(Path, sys.argv[1:]):\n"
        f"    for name, content in export(weights.stem, weights, {OPSET}).items():\n"
        "        Path(name).write_bytes(content)\n"
        "    save_checkpoint(Path(weights.name), load_checkpoint(weights))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, *checkpoints.values()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        **exported,
        **{path.name: path.read_bytes() for path in checkpoints.values()},
    }


# --- refusals -----------------------------------------------------------------------------------


def keep_no_statistics(model: nn.Sequential) -> None:
    model.bn2 = nn.BatchNorm1d(32, track_running_stats=False).eval()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.train(), "in train mode: Sequential"),
        (lambda model: model.bn2.train(), "in train mode: bn2"),
        (lambda model: model.bn1.reset_running_stats(), "bn1 has never updated"),
        (keep_no_statistics, "bn2 keeps no running statistics"),
    ],
    ids=["train mode", "one layer in train mode", "never updated", "no statistics"],
)
def test_network_that_is_not_frozen_is_not_exported(
    trained: Checkpoint, spoil: Callable[[nn.Sequential], object], message: str
) -> None:
    model = trained.model()
    spoil(model)
    with pytest.raises(CheckFailedError, match=message):
        export_onnx(model, (784,), OPSET)


def test_command_writes_the_same_bytes_again(
    project: Path, checkpoints: dict[str, Path], exported: dict[str, bytes], mnist_bn: MnistBn
) -> None:
    shutil.copytree(checkpoints["bn"].parent, project / "models")
    done = mnist_bn("export")
    assert done.status == 0, done.err
    assert done.out == "".join(
        f"models/{name}: {len(content):,} bytes\n" for name, content in exported.items()
    )
    assert {name: (project / "models" / name).read_bytes() for name in exported} == exported


def test_command_refuses_an_untrained_checkpoint(
    project: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    untrained = replace(trained, state=trained.architecture.build().state_dict())
    save_checkpoint(project / "models/bn.safetensors", untrained)
    done = mnist_bn("export")
    assert done.status == 1
    assert done.err == "FAILED: bn1 has never updated its running statistics: train first\n"
    assert not list(project.glob("models/*.onnx"))


def test_command_refuses_a_checkpoint_that_does_not_say_what_made_it(
    project: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    save_checkpoint(project / "models/bn.safetensors", replace(trained, provenance={}))
    done = mnist_bn("export")
    assert done.status == 2
    assert "models/bn.safetensors does not say what made it: params, train_sha256 mis" in done.err
    assert not list(project.glob("models/*.onnx"))


@pytest.mark.parametrize(
    ("variant", "expected", "holds"), [("plain", "bn", "without"), ("bn", "plain", "with")]
)
def test_one_network_under_the_others_name_is_refused(
    checkpoints: dict[str, Path], variant: str, expected: str, holds: str
) -> None:
    weights = checkpoints[variant]
    message = rf"{variant}\.safetensors holds the network {holds} batch norm, expected {expected}; "
    with pytest.raises(UserError, match=message + "run `dvc repro train`"):
        export(expected, weights, OPSET)


def test_command_without_a_checkpoint_names_the_stage_to_run(
    project: Path, mnist_bn: MnistBn
) -> None:
    done = mnist_bn("export")
    assert done.status == 2
    assert "no models/bn.safetensors; run `dvc repro train` first" in done.err


def test_network_that_is_not_finite_is_refused(trained_plain: Checkpoint, tmp_path: Path) -> None:
    bias = torch.full_like(trained_plain.state["linear2.bias"], torch.nan)
    broken = replace(trained_plain, state={**trained_plain.state, "linear2.bias": bias})
    save_checkpoint(tmp_path / "plain.safetensors", broken)
    with pytest.raises(CheckFailedError, match=r"^not finite: linear2\.bias; train again$"):
        export("plain", tmp_path / "plain.safetensors", OPSET)


def test_command_writes_nothing_if_the_second_network_fails(
    project: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(variant: str, *_: object) -> dict[str, bytes]:
        if variant == "plain":
            raise CheckFailedError("not finite")
        return {"bn.onnx": b"graph"}

    monkeypatch.setattr("mnist_batchnorm.stages.export.export", failing)
    done = mnist_bn("export")
    assert (done.status, done.err) == (1, "FAILED: not finite\n")
    assert not list(project.glob("models/*.onnx"))
