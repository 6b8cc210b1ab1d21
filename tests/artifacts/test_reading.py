from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS
from mnist_batchnorm.artifacts.metrics import EvaluationMetrics
from mnist_batchnorm.artifacts.reading import read_record, read_table
from mnist_batchnorm.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epoch,loss\n1,2\n", "its columns are 'epoch,loss'"),
        (",".join(CURVE_COLUMNS), "no rows"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4\n", "5 finite numbers"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4,nan\n", "5 finite numbers"),
        (",".join(CURVE_COLUMNS) + "\n1,2,3,4,x\n", "x"),
    ],
)
def test_malformed_table_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bn.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro train` writes: .*{problem}"):
        read_table(path, CURVE_COLUMNS, "train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "the file: Invalid JSON"),
        ("[]", "the file"),
        ('{"accuracy": "high"}', "accuracy"),
        ("{}", "accuracy: Field required"),
    ],
)
def test_malformed_record_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "test-bn.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"what `dvc repro evaluate` writes: {problem}"):
        read_record(path, EvaluationMetrics, "evaluate")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test-bn.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"test-bn\.json cannot be read"):
        read_record(path, EvaluationMetrics, "evaluate")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "input"


numbers = st.text(alphabet="0123456789.,-+einfa \n\r#\"'\0", max_size=60)


@example(body="#")  # starts a comment, says numpy, and warns of a file without data
@given(body=st.one_of(numbers, st.text(max_size=60)))
def test_any_table_is_read_or_refused(scratch: Path, body: str) -> None:
    scratch.write_bytes(b"x,y\n" + body.encode(errors="surrogatepass"))
    try:
        table = read_table(scratch, ("x", "y"), "train")
    except UserError:
        return
    assert table["x"].shape == table["y"].shape
    assert len(table["x"]) > 0
    assert np.isfinite(np.concatenate(list(table.values()))).all()
