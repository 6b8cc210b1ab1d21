"""A committed checkpoint, exported afresh, still gives its golden logits on real images."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from mnist_batchnorm.artifacts.goldens import PinnedOutputs, read_pinned_outputs
from mnist_batchnorm.artifacts.splits import CLASSES, Split, load_split, network_input
from mnist_batchnorm.core.arrays import relative_change
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import REGISTERED
from mnist_batchnorm.promotion.goldens import BATCH_SIZES, margins, worst_comparison
from mnist_batchnorm.promotion.onnx_model import OnnxModel, load_onnx_model
from tests.conftest import ROOT
from tests.support.pinned_fixture import (
    BOUNDARY,
    CHECKPOINT,
    CLEAR_MARGIN,
    GOLDENS,
    IMAGES,
    PARAMS,
    TYPICAL,
    float64_logits,
)

# Largest |ORT - float64| over the row's largest |logit|. Measured on these images: ORT 4.5e-7;
# float32 sums in 60 other orders, as other CPUs' kernels would take them, at most 8e-7. The mildest
# faults it must see: float16 weights 1.1e-3, epsilon lost 1.4e-3, TF32 3e-3, statistics touched by
# one forward pass in train mode 2.8e-2. 5e-6 is six times the first and 1/200 of the second.
TOLERANCE = 5e-6

EXPORT = """
import sys
from pathlib import Path
from mnist_batchnorm.stages.export import export
for name, content in export("bn", Path(sys.argv[1]), int(sys.argv[2])).items():
    Path(name).write_bytes(content)
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with both graphs: from this process, and from one that shares only the checkpoint."""
    from mnist_batchnorm.stages.export import export

    here, elsewhere = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("elsewhere")
    source = tmp_path_factory.mktemp("source") / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    opset = load_params(ROOT / "params.yaml").export.opset
    settings = {"PYTHONPATH": str(source), "PYTHONHASHSEED": "2", "TZ": "Asia/Seoul"}
    with subprocess.Popen(
        [sys.executable, "-c", EXPORT, CHECKPOINT, str(opset)],
        cwd=elsewhere,
        env=os.environ | settings,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for name, content in export("bn", CHECKPOINT, opset).items():
            (here / name).write_bytes(content)
        _, problem = process.communicate()
    assert process.returncode == 0, problem
    return here, elsewhere


@pytest.fixture(scope="module", params=REGISTERED.values())
def graph(exports: tuple[Path, Path], request: pytest.FixtureRequest) -> OnnxModel:
    return load_onnx_model(exports[0] / request.param)


@pytest.fixture(scope="module")
def images() -> Split:
    return load_split(IMAGES)


@pytest.fixture(scope="module")
def goldens(images: Split) -> PinnedOutputs:
    return read_pinned_outputs(GOLDENS, images, digest(IMAGES))


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_logits_are_the_golden_ones(
    graph: OnnxModel, goldens: PinnedOutputs, images: Split, batch_size: int
) -> None:
    logits = graph.logits(network_input(images.images), batch_size)
    assert relative_change(goldens.logits, logits).max() <= TOLERANCE
    np.testing.assert_array_equal(logits.argmax(axis=1), goldens.logits.argmax(axis=1))


def test_regress_finds_nothing(graph: OnnxModel, goldens: PinnedOutputs, images: Split) -> None:
    assert worst_comparison(graph, goldens, images).same
    assert graph.weights_sha256 == goldens.weights_sha256


def test_initializers_of_the_kept_graph_are_the_checkpoint_bit_for_bit(
    exports: tuple[Path, Path],
) -> None:
    model = onnx.load(exports[0] / "bn.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    trained = {
        name: array
        for name, array in load_file(CHECKPOINT).items()
        if not name.endswith("num_batches_tracked")  # how training went, not what it left
    }
    assert stored.keys() == trained.keys()
    for name, array in trained.items():
        assert stored[name].dtype == array.dtype, name
        assert stored[name].shape == array.shape, name
        assert stored[name].tobytes() == array.tobytes(), name


# The operators are golden, the files' own hashes are not: every new torch, onnxscript or onnx names
# nodes or itself differently, and a golden that is renewed at each upgrade guards nothing.
@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("bn.onnx", "Gemm BatchNormalization Relu Gemm BatchNormalization Relu Gemm"),
        ("bn-folded.onnx", "Gemm Relu Gemm Relu Gemm"),
    ],
)
def test_operators(exports: tuple[Path, Path], name: str, operators: str) -> None:
    nodes = onnx.load(exports[0] / name).graph.node
    assert " ".join(node.op_type for node in nodes) == operators
    for node in nodes:
        if node.op_type == "BatchNormalization":
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert given["epsilon"] == np.float32(PARAMS.bn_eps)
            assert given.get("training_mode", 0) == 0


@pytest.mark.parametrize("name", REGISTERED.values())
def test_file_bytes_are_stable(exports: tuple[Path, Path], name: str) -> None:
    first, second = ((folder / name).read_bytes() for folder in exports)
    assert first == second


@pytest.mark.parametrize("name", REGISTERED.values())
def test_file_names_no_path_of_this_machine(exports: tuple[Path, Path], name: str) -> None:
    content = (exports[0] / name).read_bytes()
    for path in (str(ROOT), sys.prefix, ".py"):
        assert path.encode() not in content, path


def test_goldens_follow_from_the_definition(goldens: PinnedOutputs, images: Split) -> None:
    assert goldens.weights_sha256 == digest(CHECKPOINT)
    logits = float64_logits(CHECKPOINT, network_input(images.images))
    # BLAS may round the last of float64's digits otherwise, so the float32 by one of its own
    np.testing.assert_array_max_ulp(goldens.logits, logits, maxulp=1)


def test_images_are_of_every_digit_typical_and_hard(goldens: PinnedOutputs, images: Split) -> None:
    assert len(images) == max(BATCH_SIZES)
    assert np.bincount(images.labels, minlength=CLASSES).min() >= TYPICAL + BOUNDARY
    margin = margins(goldens.logits) / np.abs(goldens.logits).max(axis=1)
    # near the boundary, yet no honest runtime lands on its other side
    assert CLEAR_MARGIN < margin.min() < 2 * CLEAR_MARGIN


def test_statistics_are_those_of_a_training() -> None:
    state = load_file(CHECKPOINT)
    for layer in ("bn1", "bn2"):
        assert state[f"{layer}.num_batches_tracked"] > 1000
        assert (np.abs(state[f"{layer}.running_mean"]) > 0.01).all()
        assert (np.abs(state[f"{layer}.running_var"] - 1) > 0.01).all()
