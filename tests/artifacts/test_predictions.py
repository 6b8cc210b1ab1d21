from pathlib import Path

import numpy as np
import pytest

from mnist_batchnorm.artifacts.predictions import (
    CONFUSION_COLUMNS,
    read_confusion,
    read_predictions,
    write_confusion,
    write_predictions,
)
from mnist_batchnorm.artifacts.splits import Split
from mnist_batchnorm.core.errors import UserError

PREDICTIONS = Path("reports/predictions/bn.csv")
CONFUSION = Path("reports/confusion/bn.csv")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def split() -> Split:
    labels = np.array([3, 3, 7], np.uint8)
    index = np.array([100, 101, 102], np.int32)
    return Split(np.zeros((3, 28, 28), np.uint8), labels, index)


def test_predictions_come_back_with_six_decimals(split: Split) -> None:
    write_predictions("bn", split, np.array([3, 5, 7], np.uint8), np.array([0.9, 2 / 3, 1.0]))
    assert PREDICTIONS.read_bytes().decode() == (
        "index,actual,predicted,probability\n100,3,3,0.900000\n101,3,5,0.666667\n102,7,7,1.000000\n"
    )
    predicted, probability = read_predictions("bn", split)
    assert predicted.tolist() == [3, 5, 7]
    assert probability.tolist() == [0.9, 0.666667, 1.0]


def test_predictions_for_other_images_are_refused(split: Split) -> None:
    write_predictions("bn", split, split.labels, np.ones(3))
    lines = PREDICTIONS.read_text().splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    PREDICTIONS.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"bn\.csv is about other images"):
        read_predictions("bn", split)


def test_confusion_matrix_comes_back_with_the_accuracy_of_each_class_that_has_images() -> None:
    matrix = np.zeros((10, 10), np.int64)
    matrix[4, 4], matrix[4, 9], matrix[9, 9] = 1, 2, 5
    write_confusion("bn", matrix)
    lines = CONFUSION.read_text().splitlines()
    assert lines[0] == "actual,0,1,2,3,4,5,6,7,8,9,accuracy"
    assert lines[1] == "0,0,0,0,0,0,0,0,0,0,0,"
    assert lines[5] == "4,0,0,0,0,1,0,0,0,0,2,0.3333333333333333"
    found, accuracy = read_confusion("bn")
    np.testing.assert_array_equal(found, matrix, strict=True)
    assert accuracy == {4: 1 / 3, 9: 1.0}


def confusion_csv(rows: dict[int, str]) -> str:
    """A diagonal confusion matrix with these accuracies."""
    lines = [
        ",".join([str(digit), *(str(int(digit == c)) for c in range(10)), accuracy])
        for digit, accuracy in rows.items()
    ]
    return "\n".join([",".join(CONFUSION_COLUMNS), *lines]) + "\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (confusion_csv(dict.fromkeys(range(9), "1.0")), "not the classes 0 to 9"),
        (confusion_csv(dict.fromkeys(reversed(range(10)), "1.0")), "not the classes 0 to 9"),
        (confusion_csv(dict.fromkeys(range(10), "inf")), "12 finite numbers"),
        (confusion_csv(dict.fromkeys(range(10), "1.0")).replace("\n0,1,", "\n0,,"), "''"),
        (",".join(CONFUSION_COLUMNS) + "\n0,1,2\n", "column"),
    ],
)
def test_malformed_confusion_matrix_is_refused(text: str, problem: str) -> None:
    CONFUSION.parent.mkdir(parents=True)
    CONFUSION.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro evaluate` writes: .*{problem}"):
        read_confusion("bn")
