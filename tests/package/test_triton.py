"""The Triton model repository: what its configuration says of the files, and in what form."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as proto

from mnist_batchnorm.artifacts.goldens import GOLDEN_IMAGES
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, SERVED
from mnist_batchnorm.package.proven import ProvenModel
from mnist_batchnorm.package.triton import interface, quote
from mnist_batchnorm.serve.core.settings import Settings
from tests.conftest import MnistBn
from tests.package.conftest import Package
from tests.support.candidates import ALIKE, GOOD, lay, shifted

TYPES = {"tensor(float)": proto.TYPE_FP32}
FLOAT32 = 4  # bytes


def read_config(folder: Path) -> proto.ModelConfig:
    """Parse a model's configuration by its published definition; unknown fields are errors."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), proto.ModelConfig())


@pytest.mark.parametrize("name", SERVED)
def test_configuration_tells_the_truth_about_the_file(shared_package: Package, name: str) -> None:
    folder = shared_package("triton") / name
    config = read_config(folder)
    path = folder / "1/model.onnx"
    session = onnxruntime.InferenceSession(path)
    for said, true in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [(t.name, t.data_type, [*t.dims]) for t in said] == [
            (t.name, TYPES[t.type], t.shape[1:]) for t in true
        ]
        assert all(isinstance(t.shape[0], str) for t in true)
    assert (config.name, config.platform) == (name, "onnxruntime_onnx")
    assert config.max_batch_size == Settings().limits.rows
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.max_queue_size == Settings().queue
    assert [(g.kind, g.count) for g in config.instance_group] == [
        (proto.ModelInstanceGroup.KIND_CPU, 1)
    ]
    stated = {key: value.string_value for key, value in config.parameters.items()}
    assert stated == {
        "intra_op_thread_count": "1",
        "inter_op_thread_count": "1",
        "mnist_batchnorm.sha256": digest(path),
        **session.get_modelmeta().custom_metadata_map,
    }


@pytest.mark.parametrize("name", SERVED)
def test_warm_up_is_real_images(shared_package: Package, name: str) -> None:
    folder = shared_package("triton") / name
    split = load_split(GOLDEN_IMAGES)
    images = network_input(split.images)
    label = {image.tobytes(): int(digit) for image, digit in zip(images, split.labels, strict=True)}
    seen, batches = [], []
    for sample in read_config(folder).model_warmup:
        ((tensor, value),) = sample.inputs.items()
        content = (folder / "warmup" / value.input_data_file).read_bytes()
        assert (tensor, value.data_type, [*value.dims]) == ("image", proto.TYPE_FP32, [784])
        assert len(content) == 784 * FLOAT32
        seen.append(label[content])
        batches.append(sample.batch_size)
    assert seen == [*range(10), 0]
    assert batches == [*[1] * 10, 32]
    files = {
        value.input_data_file
        for s in read_config(folder).model_warmup
        for value in s.inputs.values()
    }
    assert {path.name for path in (folder / "warmup").iterdir()} == files


def test_version_folder_has_the_registered_number(package: Package, mnist_bn: MnistBn) -> None:
    assert mnist_bn("package", "triton", "first").status == 0
    lay(shifted(ALIKE))
    mnist_bn("register")
    folder = package("triton")
    lay(GOOD)
    assert mnist_bn("package", "triton", "again").status == 0
    for name in REGISTERED:
        for place, number in ((Path("first"), 1), (folder, 2), (Path("again"), 1)):
            numbers = [path.name for path in (place / name).iterdir() if path.name.isdigit()]
            assert numbers == [str(number)]
            assert [*read_config(place / name).version_policy.specific.versions] == [number]


def test_plain_network_is_number_1(shared_package: Package) -> None:
    folder = shared_package("triton") / "mnist-plain"
    assert digest(folder / "1/model.onnx") == digest(MODELS / "plain.onnx")
    assert [*read_config(folder).version_policy.specific.versions] == [1]


@pytest.mark.usefixtures("proven")
def test_unregistered_model_has_no_number(mnist_bn: MnistBn) -> None:
    lay(shifted(ALIKE))
    done = mnist_bn("package", "triton", "out")
    assert done.status == 2
    assert done.err == (
        "error: models/bn.onnx has no version number yet, and Triton needs one; run `dvc repro "
        "register` first\n"
    )
    assert not Path("out").exists()


def test_nothing_but_models_is_a_folder(shared_package: Package) -> None:
    folder = shared_package("triton")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*SERVED}


@pytest.mark.parametrize("batch", [1, 64])
def test_frozen_batch_axis_is_refused(batch: int) -> None:
    graph = replace(GOOD, batch=batch).graph(folded=False)
    model = ProvenModel("mnist-bn", Path("models/bn.onnx"), graph, "1")
    expected = re.escape(f"image is FLOAT [{batch}, 784], expected FLOAT, the batch axis without")
    with pytest.raises(CheckFailedError, match=expected):
        interface(model)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_quoted_text_is_read_as_it_was(text: str) -> None:
    config = text_format.Parse(f"name: {quote(text)}", proto.ModelConfig())
    assert config.name == text


def test_example_of_the_quoting() -> None:
    assert quote('a"\\\n\x7fé') == '"a\\042\\134\\012\\177\\303\\251"'


def test_images_are_little_endian(shared_package: Package) -> None:
    folder = shared_package("triton") / "mnist-bn/warmup"
    pixels = np.frombuffer((folder / "digit-7").read_bytes(), "<f4")
    assert pixels.max() == 1.0
    assert pixels.min() == 0.0
