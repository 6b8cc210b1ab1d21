"""`mnist-bn package`: what it refuses, and the folder that is written whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mnist_batchnorm import package as tool
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, REGISTRY, SERVED
from mnist_batchnorm.package.folder import MANIFEST, replacing_folder, write_manifest
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.decode import decode
from mnist_batchnorm.serve.core.settings import Settings
from tests.conftest import MnistBn
from tests.package.conftest import PARITY, Package, change_parity

TARGETS = pytest.mark.parametrize("target", tool.TARGETS)
OUT = Path("out")


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def append(path: Path) -> None:
    """Alter a file: one byte more, which ONNX Runtime would not mind."""
    path.write_bytes(path.read_bytes() + b"\x72\x00")


# --- what is written ----------------------------------------------------------------------------


@TARGETS
def test_manifest_lists_every_file_and_the_proven_models(package: Package, target: str) -> None:
    folder = package(target)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {name: digest(folder / name) for name in state(folder)}
    del files[MANIFEST]
    assert manifest.pop("files") == files
    models = {
        name: {
            "file": f"models/{file}",
            "sha256": digest(MODELS / file),
            "version": "1" if name in REGISTERED else digest(MODELS / file)[:12],
            "weights_sha256": ("a" if name in REGISTERED else "c") * 64,
        }
        for name, file in SERVED.items()
    }
    assert manifest == {"schema": 1, "target": target, "models": models}
    packaged = [digest(path) for path in folder.rglob("*.onnx")]
    assert sorted(packaged) == sorted(model["sha256"] for model in models.values())


@TARGETS
def test_same_models_give_the_same_bytes(package: Package, target: str) -> None:
    before = state(package(target))
    assert state(package(target, "--force")) == before


@TARGETS
def test_plain_network_may_be_absent(package: Package, target: str) -> None:
    (MODELS / "plain.onnx").unlink()
    folder = package(target)
    assert json.loads((folder / MANIFEST).read_text())["models"].keys() == REGISTERED.keys()
    assert len(list(folder.rglob("*.onnx"))) == len(REGISTERED)
    assert "mnist-plain" not in (folder / "README.md").read_text()


@TARGETS
def test_example_is_real_images_and_what_the_models_answer(package: Package, target: str) -> None:
    folder = package(target)
    images = read_proven().images[:3]
    request = decode((folder / "request.json").read_bytes(), None, Settings().limits)
    assert request.images.tobytes() == images.tobytes()
    answers = json.loads((folder / "answers.json").read_text())
    assert answers.keys() == SERVED.keys()
    for name, answer in answers.items():
        expected = runtime.load((MODELS / SERVED[name]).read_bytes()).run(images)
        assert np.array(answer["data"], np.float32).tobytes() == expected.tobytes()
        assert answer["shape"] == [*expected.shape]


@TARGETS
def test_says_what_and_where(mnist_bn: MnistBn, proven: Path, target: str) -> None:
    done = mnist_bn("package", target, "new/out")
    assert done.status == 0
    plain = digest(MODELS / "plain.onnx")[:12]
    assert done.out == (
        f"new/out: mnist-bn 1, mnist-bn-folded 1, mnist-plain {plain} for {target}; "
        "new/out/README.md says how to start\n"
    )
    assert [path.name for path in (proven / "new").iterdir()] == ["out"]


# --- what is refused ----------------------------------------------------------------------------


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
@TARGETS
@pytest.mark.parametrize("case", UNPROVEN)
def test_unproven_file_is_refused(mnist_bn: MnistBn, target: str, case: str) -> None:
    spoil, why = UNPROVEN[case]
    spoil()
    done = mnist_bn("package", target, "out")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("FAILED: models/")
    assert why in done.err
    assert done.err.endswith("run `dvc repro verify`\n")
    assert not OUT.exists()


@pytest.mark.usefixtures("proven")
@TARGETS
@pytest.mark.parametrize("path", [MODELS / "bn.onnx", PARITY, REGISTRY], ids=str)
@pytest.mark.parametrize("change", [append, Path.unlink])
def test_file_altered_meanwhile_is_refused(
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    path: Path,
    change: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(tool, "write", lambda *_, **__: change(path))
    done = mnist_bn("package", target, "out")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"FAILED: nothing is packaged: {path} was changed meanwhile")
    assert not list(Path().glob("*out*"))


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("file", REGISTERED.values())
def test_missing_model_is_the_callers_mistake(mnist_bn: MnistBn, file: str) -> None:
    (MODELS / file).unlink()
    done = mnist_bn("package", "triton", "out")
    assert done.status == 2
    assert done.err == f"error: no models/{file}; run `dvc repro export` first\n"


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("target", ["triton", "mlflow"])
@pytest.mark.parametrize("option", ["--image=x", "--canary=5"])
def test_options_of_another_target_are_refused(mnist_bn: MnistBn, target: str, option: str) -> None:
    done = mnist_bn("package", target, "out", option)
    assert done.status == 2
    assert done.err == f"error: --image and --canary are for kserve, not for {target}\n"


# --- the folder ---------------------------------------------------------------------------------


def test_empty_folder_is_filled(package: Package) -> None:
    OUT.mkdir()
    assert (package("triton") / MANIFEST).is_file()


def test_link_to_a_folder_stays_a_link(package: Package, proven: Path) -> None:
    (proven / "real").mkdir()
    OUT.symlink_to("real")
    package("triton")
    assert OUT.is_symlink()
    assert (proven / "real" / MANIFEST).is_file()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_foreign_files_are_never_deleted(
    mnist_bn: MnistBn, proven: Path, package: Package, force: list[str]
) -> None:
    (proven / "mine").mkdir()
    (proven / "mine/notes.txt").write_text("important")
    folder = package("triton")
    (folder / "mnist-bn/2").mkdir()
    (folder / "mnist-bn/2/model.onnx").write_bytes(b"mine")
    (proven / "file").touch()
    before = state(proven)
    for name in ("mine", "out"):
        done = mnist_bn("package", "triton", name, *force)
        assert done.status == 2
        assert done.err.startswith(f"error: {name} holds something else than a package")
    done = mnist_bn("package", "triton", "file", *force)
    assert (done.status, done.err) == (
        2,
        "error: file is not a folder; name another place\n",
    )
    assert state(proven) == before


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("place", [".", "..", "/"])
def test_current_folder_and_those_above_are_refused(mnist_bn: MnistBn, place: str) -> None:
    done = mnist_bn("package", "triton", place, "--force")
    assert done.status == 2
    assert done.err == (f"error: {place} is the current folder or above it; name another one\n")


def test_package_is_replaced_only_by_force(mnist_bn: MnistBn, package: Package) -> None:
    before = state(package("triton"))
    done = mnist_bn("package", "mlflow", "out")
    assert (done.status, done.err) == (
        2,
        "error: out holds a package already; replace it with --force\n",
    )
    assert state(OUT) == before
    package("mlflow", "--force")
    assert json.loads((OUT / MANIFEST).read_text())["target"] == "mlflow"
    assert not (OUT / "mnist-bn/config.pbtxt").exists()
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("there", [True, False])
def test_full_disk_leaves_everything_as_it_was(
    mnist_bn: MnistBn, package: Package, request: pytest.FixtureRequest, there: bool
) -> None:
    if there:
        package("triton")
    before = state(Path())
    request.getfixturevalue("small_disk")
    done = mnist_bn("package", "triton", "out", "--force")
    assert done.status == 2
    assert "File too large" in done.err
    assert state(Path()) == before
    assert OUT.exists() == there
    assert not list(Path().glob(".out*"))


def test_rename_that_fails_puts_the_old_package_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(content: str) -> None:
        with replacing_folder(tmp_path / "out", force=True) as folder:
            (folder / "file").write_text(content)
            write_manifest(folder, {})

    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if (self / "file").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    write("old")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write("new")
    assert state(tmp_path).keys() == {"out/file", f"out/{MANIFEST}"}
    assert (tmp_path / "out/file").read_text() == "old"


def test_what_appears_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    def write() -> None:
        with replacing_folder(tmp_path / "out", force=True):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/notes.txt").write_text("important")

    with pytest.raises(UserError, match="holds something else"):
        write()
    assert state(tmp_path) == {"out/notes.txt": b"important"}
