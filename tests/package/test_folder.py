"""A folder is replaced atomically, and never if it holds other files."""

import json
from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.package.folder import MANIFEST, replacing_folder, write_manifest
from tests.conftest import MnistBn
from tests.package.conftest import Package

OUT = Path("out")


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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
