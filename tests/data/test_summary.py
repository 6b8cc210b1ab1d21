import numpy as np

from mnist_batchnorm.artifacts.splits import Split
from mnist_batchnorm.data.summary import summarize


def test_a_class_without_images_is_counted_as_none() -> None:
    labels = np.array([1, 1], np.uint8)
    split = Split(np.zeros((2, 28, 28), np.uint8), labels, np.arange(2, dtype=np.int32))
    summary = summarize({"train": split}, "", {})
    assert summary.per_class["train"] == {digit: 2 * (digit == 1) for digit in range(10)}
