import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mnist_batchnorm.artifacts.splits import Split, load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import PrepareParams
from mnist_batchnorm.data.idx import IMAGES_MAGIC, LABELS_MAGIC, parse_idx, read_pair
from mnist_batchnorm.data.split import split_training_images, stratified_holdout
from mnist_batchnorm.stages.prepare import describe, prepare
from tests.conftest import MnistBn

SPLITS = ("train", "valid", "test")


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    magic = 0x0800 + array.ndim
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()


def load(prepared: Path) -> dict[str, Split]:
    return {name: load_split(prepared / f"{name}.safetensors") for name in SPLITS}


# --- IDX ----------------------------------------------------------------------------------------

IDX_ARRAYS = st.sampled_from([1, 3]).flatmap(
    lambda ndim: arrays(np.uint8, array_shapes(min_dims=ndim, max_dims=ndim, min_side=0))
)


@given(IDX_ARRAYS)
def test_idx_round_trip(array: npt.NDArray[np.uint8]) -> None:
    decoded = parse_idx(idx(array), 0x0800 + array.ndim, "file")
    np.testing.assert_array_equal(decoded, array, strict=True)


@given(IDX_ARRAYS, st.data())
def test_idx_cut_short_is_refused(array: npt.NDArray[np.uint8], data: st.DataObject) -> None:
    content = idx(array)
    length = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(UserError, match=r"^file "):
        parse_idx(content[:length], 0x0800 + array.ndim, "file")


@given(IDX_ARRAYS, st.binary(min_size=1))
def test_idx_with_trailing_bytes_is_refused(array: npt.NDArray[np.uint8], more: bytes) -> None:
    with pytest.raises(UserError, match=r"^file says it holds .* bytes but holds "):
        parse_idx(idx(array) + more, 0x0800 + array.ndim, "file")


@pytest.mark.parametrize("magic", [0, LABELS_MAGIC, 0x0D03, 0x03080000, -IMAGES_MAGIC])
def test_idx_of_another_kind_is_refused(magic: int) -> None:
    content = struct.pack(">4i", magic, 1, 1, 1) + b"\0"
    with pytest.raises(UserError, match=r"^file is not an IDX file with magic number 0x0803$"):
        parse_idx(content, IMAGES_MAGIC, "file")


@pytest.mark.parametrize("shape", [(-1, 1, 1), (-1, -1, 1), (-(2**31), 0, 2), (0, -5, 0)])
def test_idx_with_negative_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^file says it holds \("):
        parse_idx(struct.pack(">4i", IMAGES_MAGIC, *shape) + b"\0", IMAGES_MAGIC, "file")


def test_idx_whose_size_overflows_is_refused() -> None:
    content = struct.pack(">4i", IMAGES_MAGIC, 2**22, 2**21, 2**21)  # 2**64, 0 in 64 bits
    with pytest.raises(UserError, match="but holds 0"):
        parse_idx(content, IMAGES_MAGIC, "file")


@given(
    st.sampled_from([IMAGES_MAGIC, LABELS_MAGIC]),
    st.lists(st.integers(-3, 3), min_size=3, max_size=3),
    st.binary(max_size=30),
)
@example(LABELS_MAGIC, [0, 0, 0], b"")
def test_any_idx_is_decoded_whole_or_refused(magic: int, sizes: list[int], rest: bytes) -> None:
    ndim = magic & 0xFF
    content = struct.pack(f">{1 + ndim}i", magic, *sizes[:ndim]) + rest
    try:
        array = parse_idx(content, magic, "file")
    except UserError:
        return
    assert idx(array) == content


@pytest.mark.slow
def test_idx_is_read_as_torchvision_reads_it(raw: Path) -> None:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    for stem in ("train", "t10k"):
        split = read_pair(raw, stem)
        images = read_image_file(str(raw / f"{stem}-images-idx3-ubyte"))
        labels = read_label_file(str(raw / f"{stem}-labels-idx1-ubyte"))
        np.testing.assert_array_equal(split.images, images.numpy(), strict=True)
        np.testing.assert_array_equal(split.labels, labels.numpy())


# --- raw files ----------------------------------------------------------------------------------


def write_pair(folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))


def zeros(*shape: int) -> npt.NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


def test_pair_knows_where_its_images_came_from(raw: Path) -> None:
    split = read_pair(raw, "t10k")
    assert split.images.shape == (500, 28, 28)
    np.testing.assert_array_equal(split.index, np.arange(500, dtype=np.int32), strict=True)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (zeros(2, 28, 28), zeros(3), r"images \(2, 28, 28\) and labels \(3,\) do not make"),
        (zeros(2, 28, 27), zeros(2), r"images \(2, 28, 27\) and labels \(2,\) do not make"),
        (zeros(0, 28, 28), zeros(0), r"images \(0, 28, 28\) and labels \(0,\) do not make"),
        (zeros(2, 28, 28), np.array([3, 10], np.uint8), "label 10, expected 0 to 9"),
    ],
)
def test_pair_that_is_no_mnist_is_refused(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], message: str
) -> None:
    write_pair(tmp_path, images, labels)
    with pytest.raises(UserError, match=message):
        read_pair(tmp_path, "train")


@pytest.mark.parametrize("missing", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_missing_raw_file_says_what_to_run(tmp_path: Path, missing: str) -> None:
    write_pair(tmp_path, zeros(1, 28, 28), zeros(1))
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"no .*{missing}; run `dvc repro download` first"):
        read_pair(tmp_path, "train")


def test_raw_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(UserError, match="train-images-idx3-ubyte cannot be read"):
        read_pair(tmp_path, "train")


# --- splits -------------------------------------------------------------------------------------


@given(
    arrays(np.uint8, st.integers(1, 300), elements=st.integers(0, 9)), st.data(), st.integers(0, 99)
)
def test_holdout_is_stratified(
    labels: npt.NDArray[np.uint8], data: st.DataObject, seed: int
) -> None:
    size = data.draw(st.integers(0, len(labels)))
    held_out = stratified_holdout(labels, size, seed)
    assert held_out.sum() == size
    for digit in range(10):
        share = (labels == digit).sum() * size / len(labels)
        assert abs(held_out[labels == digit].sum() - share) < 1


def test_holdout_gives_what_is_left_to_the_largest_remainders() -> None:
    labels = np.repeat(np.arange(4, dtype=np.uint8), [5, 3, 1, 1])
    held_out = stratified_holdout(labels, 4, seed=0)  # shares 2, 1.2, 0.4, 0.4
    assert np.bincount(labels[held_out], minlength=4).tolist() == [2, 1, 1, 0]


def test_holdout_is_drawn_by_its_seed() -> None:
    labels = np.resize(np.arange(10, dtype=np.uint8), 1000)
    first = stratified_holdout(labels, 100, seed=0)
    assert (first == stratified_holdout(labels, 100, seed=0)).all()
    overlap = (first & stratified_holdout(labels, 100, seed=1)).sum()
    assert overlap < 30  # 10 expected of two independent draws


def test_train_and_valid_share_no_image_and_lose_none(raw: Path, prepared: Path) -> None:
    training, splits = read_pair(raw, "train"), load(prepared)
    train, valid = splits["train"], splits["valid"]
    assert (len(train), len(valid)) == (1800, 200)
    assert sorted([*train.index, *valid.index]) == list(range(2000))
    for split in (train, valid):
        np.testing.assert_array_equal(split.images, training.images[split.index])
        np.testing.assert_array_equal(split.labels, training.labels[split.index])


def test_test_images_are_all_there_in_order(raw: Path, prepared: Path) -> None:
    test, original = load(prepared)["test"], read_pair(raw, "t10k")
    for name, array in vars(original).items():
        np.testing.assert_array_equal(getattr(test, name), array)


def test_valid_size_0_watches_the_test_images(raw: Path) -> None:
    training, test = read_pair(raw, "train"), read_pair(raw, "t10k")
    splits = split_training_images(training, test, PrepareParams(valid_size=0, seed=0))
    assert splits == {"train": training, "valid": test, "test": test}


@pytest.mark.parametrize("size", [2000, 2001, 2**62])
def test_valid_size_that_leaves_nothing_is_refused(raw: Path, size: int) -> None:
    training, test = read_pair(raw, "train"), read_pair(raw, "t10k")
    with pytest.raises(UserError, match=rf"prepare\.valid_size: {size} of 2000 training images"):
        split_training_images(training, test, PrepareParams(valid_size=size, seed=0))


# --- the stage ----------------------------------------------------------------------------------


def test_metrics_are_true(raw: Path, prepared: Path) -> None:
    splits = load(prepared)
    pixels = splits["train"].images / 255
    content = json.loads((prepared / "data.json").read_text())
    assert content.pop("train_pixel_mean") == pytest.approx(pixels.mean(), rel=1e-12)
    assert content.pop("train_pixel_std") == pytest.approx(pixels.std(), rel=1e-12)
    assert content == {
        "protocol": "valid: 200 training images held out",
        "images": {"train": 1800, "valid": 200, "test": 500},
        "per_class": {
            name: {str(digit): int((split.labels == digit).sum()) for digit in range(10)}
            for name, split in splits.items()
        },
        "sha256": {
            "raw": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in raw.iterdir()
            },
            "prepared": {
                name: hashlib.sha256((prepared / f"{name}.safetensors").read_bytes()).hexdigest()
                for name in SPLITS
            },
        },
    }


def test_a_class_without_images_is_counted_as_none() -> None:
    split = Split(zeros(2, 28, 28), np.array([1, 1], np.uint8), np.arange(2, dtype=np.int32))
    per_class = describe({"train": split}, "")["per_class"]["train"]
    assert per_class == {str(digit): 2 * (digit == 1) for digit in range(10)}


def test_same_seed_makes_the_same_files(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path, tmp_path / "data.json", PrepareParams(valid_size=200, seed=0))
    for path in prepared.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_another_seed_holds_out_other_images(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path, tmp_path / "data.json", PrepareParams(valid_size=200, seed=1))
    ours, theirs = (set(load(folder)["valid"].index) for folder in (tmp_path, prepared))
    assert len(ours & theirs) < 60  # 20 expected of two independent draws
    facts, others = (
        json.loads((folder / "data.json").read_text()) for folder in (tmp_path, prepared)
    )
    assert facts["per_class"] == others["per_class"]


def test_command_says_that_valid_is_test(project: Path, raw: Path, mnist_bn: MnistBn) -> None:
    shutil.copytree(raw, project / "data/raw")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("valid_size: 5000", "valid_size: 0"))
    done = mnist_bn("prepare")
    assert done.status == 0
    assert "valid = the test images" in done.err
    assert load(project / "data/prepared")["valid"].images.shape == (500, 28, 28)
    facts = json.loads((project / "reports/metrics/data.json").read_text())
    assert "not independent of test" in facts["protocol"]


def test_command_refuses_a_split_that_is_too_large(
    project: Path, raw: Path, mnist_bn: MnistBn
) -> None:
    shutil.copytree(raw, project / "data/raw")
    done = mnist_bn("prepare")  # 5,000 of the slice's 2,000
    assert done.status == 2
    assert "prepare.valid_size" in done.err
    assert not (project / "data/prepared").exists()
