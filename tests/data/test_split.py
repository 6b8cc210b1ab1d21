from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import PrepareParams
from mnist_batchnorm.data.idx import read_pair
from mnist_batchnorm.data.split import split_training_images, stratified_holdout


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
    training = read_pair(raw, "train")
    train, valid = (load_split(prepared / f"{name}.safetensors") for name in ("train", "valid"))
    assert (len(train), len(valid)) == (1800, 200)
    assert sorted([*train.index, *valid.index]) == list(range(2000))
    for split in (train, valid):
        np.testing.assert_array_equal(split.images, training.images[split.index])
        np.testing.assert_array_equal(split.labels, training.labels[split.index])


def test_test_images_are_all_there_in_order(raw: Path, prepared: Path) -> None:
    test, original = load_split(prepared / "test.safetensors"), read_pair(raw, "t10k")
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
