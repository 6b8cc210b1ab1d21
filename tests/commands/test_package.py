"""``mnist-bn package``: its messages and options."""

from pathlib import Path

import pytest

from mnist_batchnorm.commands import package as command
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.package.write import TARGETS
from tests.conftest import MnistBn
from tests.package.conftest import proven, proven_template  # noqa: F401

ALL_TARGETS = pytest.mark.parametrize("target", TARGETS)


@pytest.mark.usefixtures("proven")
@ALL_TARGETS
def test_the_command_reports_what_it_wrote_and_where(mnist_bn: MnistBn, target: str) -> None:
    done = mnist_bn("package", target, "new/out")
    assert done.status == 0
    plain = digest(MODELS / "plain.onnx")[:12]
    assert done.out == (
        f"new/out: mnist-bn 1, mnist-bn-folded 1, mnist-plain {plain} for {target}; "
        "new/out/README.md says how to start\n"
    )
    assert [path.name for path in Path("new").iterdir()] == ["out"]


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("target", ["triton", "mlflow"])
@pytest.mark.parametrize("option", ["--image=x", "--canary=5"])
def test_options_of_another_target_are_refused(mnist_bn: MnistBn, target: str, option: str) -> None:
    done = mnist_bn("package", target, "out", option)
    assert done.status == 2
    assert done.err == f"error: --image and --canary are for kserve, not for {target}\n"


@pytest.mark.usefixtures("proven")
def test_an_unproven_model_is_refused(mnist_bn: MnistBn) -> None:
    (MODELS / "bn.onnx").write_bytes((MODELS / "bn.onnx").read_bytes() + b"\x72\x00")
    done = mnist_bn("package", "triton", "out")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("FAILED: models/bn.onnx is not packaged: ")
    assert not Path("out").exists()


@pytest.mark.usefixtures("proven")
def test_a_model_changed_meanwhile_leaves_no_package(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "write", lambda *_, **__: (MODELS / "bn.onnx").unlink())
    done = mnist_bn("package", "triton", "out")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("FAILED: nothing is packaged: models/bn.onnx was changed meanwhile")
    assert not list(Path().glob("*out*"))


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("percent", ["-1", "101", "many"])
def test_canary_is_a_percentage(mnist_bn: MnistBn, percent: str) -> None:
    done = mnist_bn("package", "kserve", "out", f"--canary={percent}")
    assert done.status == 2
    assert "--canary" in done.err


@pytest.mark.usefixtures("proven")
def test_an_invalid_image_reference_is_an_error(mnist_bn: MnistBn) -> None:
    done = mnist_bn("package", "kserve", "out", "--image", "a b")
    assert done.status == 2
    assert "is no reference of a container image" in done.err
    assert not Path("out").exists()
