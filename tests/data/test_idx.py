import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.data.idx import IMAGES_MAGIC, LABELS_MAGIC, parse_idx, read_pair


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    magic = 0x0800 + array.ndim
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()


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
