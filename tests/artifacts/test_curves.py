from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS, Epoch, read_curve, write_curve


def test_curve_is_a_csv_with_exact_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    curve = [Epoch(1, 1 / 3, 0.9, 0.1 + 0.2, 1.0), Epoch(2, 1e-7, 1.0, 2.5, 0.0)]
    write_curve("bn", curve)
    text = Path("reports/curves/bn.csv").read_bytes().decode()
    assert text.startswith("epoch,train_loss,train_accuracy,valid_loss,valid_accuracy\n1,0.333")
    assert "\r" not in text
    columns = read_curve("bn")
    assert tuple(columns) == CURVE_COLUMNS
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    assert [Epoch(int(number), *values) for number, *values in rows] == curve
