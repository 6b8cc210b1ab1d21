"""Only files that the gate has passed, and that have not changed since, are packaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, REGISTRY
from mnist_batchnorm.package.proven import read_proven
from tests.package.conftest import PARITY, change_parity


def append(path: Path) -> None:
    """Alter a file: one byte more, which ONNX Runtime would not mind."""
    path.write_bytes(path.read_bytes() + b"\x72\x00")


def fail_a_check() -> None:
    change_parity(lambda content: content["graphs"]["bn.onnx"]["checks"][0].update(status="failed"))


def deny_parity() -> None:
    change_parity(lambda content: content["graphs"]["bn-folded.onnx"].update(parity=False))


def leave_a_check_out() -> None:
    change_parity(lambda content: content["graphs"]["bn.onnx"].update(checks=[]))


def move_a_golden_output() -> None:
    change_parity(lambda content: content["goldens"]["logits"]["bn.onnx"][3].__setitem__(0, 1000.0))


def prove_what_does_not_load() -> None:
    (MODELS / "bn.onnx").write_bytes(b"no model")
    sha256 = digest(MODELS / "bn.onnx")
    change_parity(lambda content: content["graphs"]["bn.onnx"]["onnx"].update(sha256=sha256))


UNPROVEN: dict[str, tuple[Callable[[], object], str]] = {
    "bn altered": (lambda: append(MODELS / "bn.onnx"), "about other files"),
    "folded altered": (lambda: append(MODELS / "bn-folded.onnx"), "about other files"),
    "plain altered": (lambda: append(MODELS / "plain.onnx"), "models/plain.onnx is not"),
    "no report": (PARITY.unlink, "no reports/parity.json"),
    "broken report": (lambda: PARITY.write_text("{"), "not what `dvc repro verify` writes"),
    "failed check": (fail_a_check, "no parity"),
    "no parity": (deny_parity, "no parity"),
    "no checks": (leave_a_check_out, "no parity"),
    "other outputs": (move_a_golden_output, "its outputs are off by"),
    "no model": (prove_what_does_not_load, "it is proven, but does not load here: "),
}


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("case", UNPROVEN)
def test_an_unproven_file_is_refused(case: str) -> None:
    spoil, why = UNPROVEN[case]
    spoil()
    with pytest.raises(CheckFailedError) as error:
        read_proven()
    message = str(error.value)
    assert message.startswith("models/")
    assert why in message
    assert message.endswith("run `dvc repro verify`")


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("path", [MODELS / "bn.onnx", PARITY, REGISTRY], ids=str)
@pytest.mark.parametrize("change", [append, Path.unlink])
def test_a_file_changed_since_it_was_read_is_refused(
    path: Path, change: Callable[[Path], None]
) -> None:
    proven = read_proven()
    change(path)
    with pytest.raises(CheckFailedError, match=rf"nothing is packaged: {path} was changed"):
        proven.require_unchanged()


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("file", REGISTERED.values())
def test_a_missing_model_is_an_error(file: str) -> None:
    (MODELS / file).unlink()
    with pytest.raises(UserError, match=f"no models/{file}; run `dvc repro export` first"):
        read_proven()
