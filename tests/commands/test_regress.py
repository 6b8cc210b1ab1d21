"""`mnist-bn regress` tells rounding from change, and names what changed."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper

from mnist_batchnorm.artifacts.goldens import (
    GOLDEN_FILES,
    GOLDEN_FOLDER,
    GOLDEN_IMAGES,
    PinnedOutputs,
    pinned_images,
    read_pinned_outputs,
    write_pinned_outputs,
)
from mnist_batchnorm.artifacts.splits import Split, load_split, network_input
from mnist_batchnorm.core import paths
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.promotion.goldens import compare
from tests.conftest import ROOT, MnistBn
from tests.support.graphs import REGRESSION, Network, arrays_of

GOLDEN_FILE = GOLDEN_FILES["bn"]


def torch_logits(network: torch.nn.Module, split: Split) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = network(torch.from_numpy(network_input(split.images))).numpy()
    return logits


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(arrays_of(load_checkpoint(REGRESSION / "checkpoint.safetensors").model()))


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(ROOT / GOLDEN_IMAGES)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Network) -> Path:
    """A folder with the fixture's images and all graphs, and no goldens yet."""
    monkeypatch.chdir(tmp_path)
    GOLDEN_FOLDER.mkdir(parents=True)
    shutil.copy(ROOT / GOLDEN_IMAGES, GOLDEN_IMAGES)
    network.write()
    network.write_plain()
    return tmp_path


@pytest.fixture
def run(project: Path, mnist_bn: MnistBn) -> MnistBn:
    """Run ``mnist-bn regress`` with arguments, in the project's folder."""
    return partial(mnist_bn, "regress")


@pytest.fixture
def pinned(run: MnistBn) -> bytes:
    """The goldens of the present models."""
    assert run("--update").status == 0
    return GOLDEN_FILE.read_bytes()


@pytest.mark.usefixtures("pinned")
def test_unchanged_models_pass(run: MnistBn) -> None:
    outcome = run()
    assert outcome.status == 0
    for name in paths.GRAPHS:
        assert f"models/{name}: same outputs" in outcome.out
    assert outcome.out.count("the very file that was pinned") == 3
    assert outcome.out.count("0 of 64 changed") == 3
    assert outcome.err == ""


@pytest.mark.usefixtures("pinned")
def test_same_network_in_other_files_passes(run: MnistBn) -> None:
    for name in paths.GRAPHS:
        proto = onnx.load(paths.MODELS / name)
        proto.producer_name = "another exporter"
        onnx.save(proto, paths.MODELS / name)
    outcome = run()
    assert outcome.status == 0
    assert outcome.out.count("the pinned weights (aaaaaaaaaaaa), but the file is another") == 2
    assert outcome.out.count("the pinned weights (cccccccccccc), but the file is another") == 1


@pytest.mark.usefixtures("pinned")
def test_plain_is_held_to_goldens_of_its_own(run: MnistBn, network: Network) -> None:
    own = GOLDEN_FILES["plain"]
    assert own.read_bytes() != GOLDEN_FILE.read_bytes()
    before = {path: path.read_bytes() for path in GOLDEN_FILES.values()}
    network.write_plain(shift=0.5)
    outcome = run("--json")
    assert outcome.status == 1
    graphs = json.loads(outcome.out)["graphs"]
    assert {name: graph["same"] for name, graph in graphs.items()} == {
        "bn.onnx": True,
        "bn-folded.onnx": True,
        "plain.onnx": False,
    }
    assert graphs["plain.onnx"]["goldens"]["path"] == own.as_posix()
    assert graphs["bn.onnx"]["goldens"]["path"] == GOLDEN_FILE.as_posix()
    assert outcome.err.startswith(f"FAILED: plain.onnx: outputs differ from {own}; if that is")
    assert run("--update").status == 0
    after = {path: path.read_bytes() for path in GOLDEN_FILES.values()}
    assert {path for path in before if before[path] != after[path]} == {own}
    assert run().status == 0


@pytest.mark.usefixtures("pinned")
def test_batch_norms_graph_is_not_plain(run: MnistBn) -> None:
    shutil.copy(paths.MODELS / "bn-folded.onnx", paths.MODELS / "plain.onnx")
    outcome = run()
    assert outcome.status == 1
    assert "models/plain.onnx: OUTPUTS CHANGED" in outcome.out
    assert "other weights: pinned cccccccccccc, now aaaaaaaaaaaa" in outcome.out


@pytest.mark.usefixtures("pinned")
def test_statistics_touched_by_one_forward_pass_are_reported_with_names_and_numbers(
    run: MnistBn, split: Split
) -> None:
    touched = load_checkpoint(REGRESSION / "checkpoint.safetensors").model()
    before = torch_logits(touched, split)
    torch_logits(touched.train(), split)
    touched.eval()
    after = torch_logits(touched, split)
    Network(arrays_of(touched), weights_sha256="b" * 64).write()

    outcome = run("--json")
    assert outcome.status == 1
    content = json.loads(outcome.out)
    assert content["same"] is False
    change = np.abs(after - before).max(axis=1) / np.abs(before).max(axis=1)
    flipped = np.flatnonzero(before.argmax(axis=1) != after.argmax(axis=1))
    assert flipped.size > 0
    margin = np.diff(np.sort(after, axis=1)[:, -2:], axis=1)[:, 0]
    assert content["graphs"].pop("plain.onnx")["same"] is True
    for report in content["graphs"].values():
        assert report["same"] is False
        assert report["max_change"] == pytest.approx(change.max(), rel=1e-3)
        assert report["median_change"] == pytest.approx(np.median(change), rel=1e-3)
        assert report["images_beyond"] == len(split)
        assert report["right_before"] == (before.argmax(axis=1) == split.labels).sum()
        assert report["right_after"] == (after.argmax(axis=1) == split.labels).sum()
        assert [
            (flip["index"], flip["label"], flip["before"], flip["after"])
            for flip in report["flips"]
        ] == [
            (split.index[i], split.labels[i], before[i].argmax(), after[i].argmax())
            for i in flipped
        ]
        assert [flip["margin_after"] for flip in report["flips"]] == pytest.approx(
            margin[flipped], rel=1e-2, abs=1e-4
        )

    outcome = run()
    assert outcome.status == 1
    assert "other weights: pinned aaaaaaaaaaaa, now bbbbbbbbbbbb" in outcome.out
    for flip in content["graphs"]["bn.onnx"]["flips"]:
        assert (
            f"image {flip['index']:>4}, a {flip['label']}: {flip['before']} -> {flip['after']}"
        ) in outcome.out
    assert "bn.onnx, bn-folded.onnx: outputs differ" in outcome.err
    assert "mnist-bn regress --update" in outcome.err


@pytest.mark.usefixtures("pinned")
def test_one_weight_in_one_graph_is_that_graphs_change(run: MnistBn, network: Network) -> None:
    bias = network.state["linear3.bias"].copy()
    bias[3] += 0.5
    changed = replace(network, state=network.state | {"linear3.bias": bias})
    (paths.MODELS / "bn-folded.onnx").write_bytes(changed.graph(folded=True))
    outcome = run()
    assert outcome.status == 1
    assert "models/bn.onnx: same outputs" in outcome.out
    assert "models/bn-folded.onnx: OUTPUTS CHANGED" in outcome.out
    assert "FAILED: bn-folded.onnx: outputs differ" in outcome.err


def test_change_below_rounding_passes_and_just_above_fails(split: Split, network: Network) -> None:
    golden = torch_logits(load_checkpoint(REGRESSION / "checkpoint.safetensors").model(), split)
    step = np.zeros_like(golden)
    step[5, golden[5].argmin()] = np.abs(golden[5]).max()
    below = compare(golden, golden + np.float32(0.8) * 1e-5 * step, split, 64)
    above = compare(golden, golden + np.float32(1.2) * 1e-5 * step, split, 64)
    assert below.same
    assert 5e-6 < below.max_change < 1e-5
    assert not above.same
    assert (above.images_beyond, above.flips) == (1, ())


def test_update_accepts_a_change(run: MnistBn, pinned: bytes, network: Network) -> None:
    bias = network.state["linear3.bias"] + np.float32(0.5)
    replace(network, state=network.state | {"linear3.bias": bias}).write()
    assert run().status == 1
    assert GOLDEN_FILE.read_bytes() == pinned  # only --update writes
    assert run("--update").status == 0
    assert GOLDEN_FILE.read_bytes() != pinned
    assert run().status == 0


def test_update_writes_the_same_bytes_again(run: MnistBn, pinned: bytes) -> None:
    assert run("--update").status == 0
    assert GOLDEN_FILE.read_bytes() == pinned


@pytest.mark.usefixtures("pinned")
def test_goldens_have_a_line_an_image(split: Split) -> None:
    lines = GOLDEN_FILE.read_text().splitlines()
    rows = [line for line in lines if '"logits"' in line]
    assert [json.loads(row.rstrip(","))["index"] for row in rows] == split.index.tolist()


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    logits=arrays(
        np.float32, (1, 10), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
@example(logits=np.full((1, 10), np.finfo(np.float32).max))  # its shortest decimal is larger
def test_goldens_restore_every_float32(tmp_path: Path, split: Split, logits: np.ndarray) -> None:
    one = Split(split.images[:1], split.labels[:1], split.index[:1])
    goldens = PinnedOutputs(
        computed_by="hypothesis",
        weights_sha256=None,
        onnx_sha256={},
        images_sha256="0" * 64,
        images=pinned_images(one, logits),
    )
    path = tmp_path / "goldens.json"
    write_pinned_outputs(path, goldens)
    loaded = read_pinned_outputs(path, one, "0" * 64)
    assert loaded == goldens
    assert loaded.logits.tobytes() == logits.tobytes()


@pytest.mark.parametrize("path", GOLDEN_FILES.values())
@pytest.mark.usefixtures("pinned")
def test_missing_goldens_say_how_to_pin_them(run: MnistBn, path: Path) -> None:
    path.unlink()
    outcome = run()
    assert outcome.status == 2
    assert f"no {path}" in outcome.err
    assert "mnist-bn regress --update" in outcome.err


@pytest.mark.parametrize("name", paths.GRAPHS)
def test_missing_model_says_how_to_make_it(run: MnistBn, name: str) -> None:
    (paths.MODELS / name).unlink()
    outcome = run()
    assert outcome.status == 2
    assert f"no models/{name}; run `dvc repro export` first" in outcome.err


def test_another_folder_is_named(run: MnistBn, project: Path) -> None:
    shutil.rmtree(GOLDEN_FOLDER)
    outcome = run()
    assert outcome.status == 2
    assert f"no {GOLDEN_IMAGES} in {project}" in outcome.err


def without_last_image(text: str) -> str:
    content = json.loads(text)
    content["images"].pop()
    return json.dumps(content)


def with_logit(text: str, logit: object) -> str:
    content = json.loads(text)
    content["images"][2]["logits"][4] = logit
    return json.dumps(content)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda _: "", "the file: Invalid JSON"),
        (lambda text: text[:5000], "the file: Invalid JSON"),
        (lambda _: "[]", "the file: "),
        (lambda text: text.replace('"images_sha256"', '"sha"'), "images_sha256: Field required"),
        (lambda text: with_logit(text, "1"), "images.2.logits.4: "),
        (lambda text: with_logit(text, None), "images.2.logits.4: "),
        (lambda text: with_logit(text, float("nan")), "images.2.logits.4: "),
        (lambda text: with_logit(text, 1e39), "images.2.logits.4: "),
        (lambda text: text.replace(", -", ", 1, -", 1), "images.0.logits: Tuple should have at"),
        (without_last_image, "belongs to other images"),
        (lambda text: text.replace('"index": 1,', '"index": 9,'), "belongs to other images"),
    ],
)
def test_damaged_goldens_are_refused(
    run: MnistBn, pinned: bytes, damage: Callable[[str], str], complaint: str
) -> None:
    GOLDEN_FILE.write_text(damage(pinned.decode()))
    outcome = run()
    assert outcome.status == 2
    assert complaint in outcome.err
    assert str(GOLDEN_FILE) in outcome.err
    assert "mnist-bn regress --update" in outcome.err


def test_goldens_of_other_images_are_refused(run: MnistBn, pinned: bytes) -> None:
    text = pinned.decode()
    GOLDEN_FILE.write_text(text.replace(digest(GOLDEN_IMAGES), "0" * 64))
    outcome = run()
    assert outcome.status == 2
    assert "belongs to other images" in outcome.err


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_goldens_is_read_or_refused(
    tmp_path: Path, split: Split, data: st.DataObject
) -> None:
    whole = (REGRESSION / "goldens.json").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 200))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + length :]
    path = tmp_path / "goldens.json"
    path.write_bytes(damaged)
    try:
        goldens = read_pinned_outputs(path, split, digest(ROOT / GOLDEN_IMAGES))
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert goldens.logits.shape == (64, 10)
        assert np.isfinite(goldens.logits).all()


@pytest.mark.parametrize(
    "size", [0, 1, 1000, -1], ids=["empty", "1 byte", "1000 bytes", "all but one"]
)
@pytest.mark.usefixtures("pinned")
def test_damaged_model_is_refused(run: MnistBn, size: int) -> None:
    path = paths.MODELS / "bn.onnx"
    path.write_bytes(path.read_bytes()[:size])
    outcome = run()
    assert outcome.status == 2
    assert "models/bn.onnx is not an ONNX model that runs" in outcome.err
    assert "dvc repro export" in outcome.err


@pytest.mark.usefixtures("pinned")
def test_damaged_images_are_refused(run: MnistBn) -> None:
    GOLDEN_IMAGES.write_bytes(b"not safetensors")
    outcome = run()
    assert outcome.status == 2
    assert f"{GOLDEN_IMAGES} is not a prepared split" in outcome.err


@pytest.mark.usefixtures("pinned")
def test_frozen_batch_axis_fails(run: MnistBn, network: Network) -> None:
    replace(network, batch=64).write()
    outcome = run()
    assert outcome.status == 1
    assert "models/bn.onnx does not run at batch size 32" in outcome.err


@pytest.mark.usefixtures("pinned")
def test_statistics_of_the_batch_fail(run: MnistBn, network: Network) -> None:
    content = replace(network, training_mode=1).graph(folded=False)
    (paths.MODELS / "bn.onnx").write_bytes(content)
    outcome = run("--json")
    assert outcome.status == 1
    report = json.loads(outcome.out)["graphs"]["bn.onnx"]
    assert report["batch_size"] == 1  # one image's statistics say nothing of the others
    assert report["max_change"] > 0.1


@pytest.mark.usefixtures("pinned")
def test_nan_fails(run: MnistBn, network: Network) -> None:
    bias = network.state["linear3.bias"].copy()
    bias[0] = np.nan
    replace(network, state=network.state | {"linear3.bias": bias}).write()
    outcome = run()
    assert outcome.status == 1
    assert "models/bn.onnx gives NaN or infinite logits for 64 of 64 images" in outcome.err


@pytest.mark.usefixtures("pinned")
def test_another_number_of_classes_fails(run: MnistBn, network: Network) -> None:
    shape = [network.state[f"linear3.{key}"][:5] for key in ("weight", "bias")]
    state = network.state | dict(zip(("linear3.weight", "linear3.bias"), shape, strict=True))
    proto = onnx.load_from_string(network.graph(folded=False))
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(state[tensor.name], tensor.name))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(proto, paths.MODELS / "bn.onnx")
    outcome = run()
    assert outcome.status == 1
    assert "float32 (64, 5) at batch size 64, expected float32 (64, 10)" in outcome.err


def test_graphs_that_disagree_are_not_pinned(run: MnistBn, pinned: bytes, network: Network) -> None:
    bias = network.state["linear3.bias"] + np.float32(0.5)
    changed = replace(network, state=network.state | {"linear3.bias": bias})
    (paths.MODELS / "bn-folded.onnx").write_bytes(changed.graph(folded=True))
    outcome = run("--update")
    assert outcome.status == 1
    assert "nothing pinned" in outcome.err
    assert "models/bn-folded.onnx differs from models/bn.onnx" in outcome.err
    assert GOLDEN_FILE.read_bytes() == pinned


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_interrupted_update_leaves_the_old_goldens(
    run: MnistBn,
    pinned: bytes,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
) -> None:
    bias = network.state["linear3.bias"] + np.float32(0.5)
    replace(network, state=network.state | {"linear3.bias": bias}).write()

    def interrupted(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        outcome = run("--update")
    assert outcome.status != 0
    assert GOLDEN_FILE.read_bytes() == pinned
    assert {path.name for path in GOLDEN_FOLDER.iterdir()} == {
        GOLDEN_IMAGES.name,
        *(path.name for path in GOLDEN_FILES.values()),
    }
    if isinstance(fault, OSError):
        assert outcome.status == 2
        assert f"{GOLDEN_FILE} cannot be written: No space left" in outcome.err


def test_update_and_json_exclude_each_other(run: MnistBn) -> None:
    outcome = run("--update", "--json")
    assert outcome.status == 2
    assert "--update compares nothing" in outcome.err
    assert not GOLDEN_FILE.exists()


@pytest.mark.usefixtures("pinned")
def test_imports_nothing_heavy(project: Path) -> None:
    script = """
import sys
from mnist_batchnorm.cli import main
sys.argv = ["mnist-bn", "regress"]
try:
    main()
finally:
    print([m for m in ("torch", "mlflow", "onnx", "matplotlib", "dvc") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
