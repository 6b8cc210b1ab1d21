from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mnist_batchnorm.artifacts.splits import Split, load_split, network_input, save_split
from mnist_batchnorm.core.errors import UserError

PIXELS = np.arange(256, dtype=np.uint8)
EVERY_PIXEL = np.resize(PIXELS, (3, 28, 28))


def a_split(n: int = 3) -> Split:
    generator = np.random.default_rng(n)
    return Split(
        generator.integers(0, 256, (n, 28, 28), dtype=np.uint8),
        generator.integers(0, 10, n, dtype=np.uint8),
        generator.permutation(n).astype(np.int32),
    )


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 784)])
def test_network_input_is_pixel_over_255(shape: tuple[int, ...]) -> None:
    images = EVERY_PIXEL.reshape(shape)
    before = images.copy()
    inputs = network_input(images)
    assert inputs.shape == (3, 784)
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, (before.reshape(3, 784) / 255).astype(np.float32))
    np.testing.assert_array_equal(images, before)


def test_network_input_is_what_torch_on_the_cpu_computes() -> None:
    import torch

    inputs = torch.from_numpy(network_input(EVERY_PIXEL))
    assert torch.equal(inputs, torch.from_numpy(EVERY_PIXEL).flatten(1).float() / 255)


@pytest.mark.slow
def test_network_input_is_what_the_lectures_transform_computes() -> None:
    import torch
    from torchvision.transforms.functional import to_tensor

    inputs = torch.from_numpy(network_input(EVERY_PIXEL))
    for image, row in zip(EVERY_PIXEL, inputs, strict=True):
        assert torch.equal(row, to_tensor(image[:, :, None]).flatten())


def test_split_comes_back_as_it_was(tmp_path: Path) -> None:
    split = a_split()
    save_split(tmp_path / "split", split)
    loaded = load_split(tmp_path / "split")
    for name, array in vars(split).items():
        np.testing.assert_array_equal(getattr(loaded, name), array, strict=True)
    assert len(loaded) == 3


def test_same_split_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_split(tmp_path / name, a_split())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_failed_save_leaves_the_old_split(tmp_path: Path) -> None:
    path = tmp_path / "split"
    save_split(path, a_split(3))
    unwritable = replace(a_split(4), index=np.array(["a"] * 4))
    with pytest.raises(SafetensorError, match="str32"):
        save_split(path, unwritable)
    assert len(load_split(path)) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("small_disk")
def test_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large"):
        save_split(tmp_path / "split", a_split(10))
    assert list(tmp_path.iterdir()) == []


def test_missing_split_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*train\.safetensors; run `dvc repro prepare` first"):
        load_split(tmp_path / "train.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((3, 28, 28), np.float32)},
        {"images": np.zeros((3, 784), np.uint8)},
        {"images": np.zeros((3, 28, 27), np.uint8)},
        {"images": np.zeros((4, 28, 28), np.uint8)},
        {"images": np.array(3, np.uint8)},
        {"labels": np.zeros(3, np.float32)},
        {"labels": np.zeros((3, 1), np.uint8)},
        {"labels": np.array(3, np.uint8)},
        {"index": np.zeros(3, np.int64)},
        {"index": np.zeros(4, np.int32)},
        {"index": None},
        {"weights": np.zeros(3)},
        {name: array[:0] for name, array in vars(a_split()).items()},
    ],
    ids=lambda change: " ".join(f"{name} {getattr(a, 'shape', '')}" for name, a in change.items()),
)
def test_file_that_holds_something_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    arrays = {name: a for name, a in (vars(a_split()) | change).items() if a is not None}
    save_file(arrays, tmp_path / "split")
    with pytest.raises(UserError, match=r"split is not a prepared split: "):
        load_split(tmp_path / "split")


@pytest.mark.parametrize("damage", ["folder", "empty", "truncated", "garbage"])
def test_unreadable_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "split"
    save_split(path, a_split())
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-1], "garbage": b"\xff" * 99}[damage])
    with pytest.raises(UserError, match=r"split is not a prepared split: "):
        load_split(path)
