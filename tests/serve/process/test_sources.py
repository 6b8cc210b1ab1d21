"""The models that the command line names."""

from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.serve.core.catalog import FileSource
from mnist_batchnorm.serve.process.sources import parse_sources
from mnist_batchnorm.serve.registry.source import RegisteredSource
from tests.support import commands


def test_files_and_registered_versions_get_the_names_of_the_command_line(tmp_path: Path) -> None:
    champion = "models:/mnist-bn@champion"
    words = [champion, "digits=models:/mnist-bn/3", "models:/a=b@c", "x=a=b.onnx", "y/bn.onnx", "z"]
    sources = parse_sources(words, Path("parity.json"), tmp_path, allow_unverified=True)
    assert [one.name for one in sources] == ["mnist-bn", "digits", "a=b", "x", "mnist-bn", "z"]
    assert all(source.allow_unverified for source in sources)  # type: ignore[attr-defined]
    folders = [one.folder for one in sources if isinstance(one, RegisteredSource)]
    assert len(set(folders)) == 3
    assert all(tmp_path in folder.parents for folder in folders)
    files = [one.onnx for one in sources if isinstance(one, FileSource)]
    assert files == [Path("a=b.onnx"), Path("y/bn.onnx"), Path("z")]


def test_the_pipelines_models_are_the_default(tmp_path: Path) -> None:
    sources = parse_sources([], Path("parity.json"), tmp_path, allow_unverified=False)
    assert sources[0] == FileSource("mnist-bn", MODELS / "bn.onnx", Path("parity.json"))
    assert [source.name for source in sources] == ["mnist-bn", "mnist-bn-folded", "mnist-plain"]


@pytest.mark.parametrize(
    "word",
    [
        "=models/bn.onnx",
        "a/b=models/bn.onnx",
        "a/b=models:/m/1",
        "\udcff=models/bn.onnx",
        "\udcff=models:/m/1",
        "models/\udcff.onnx",
    ],
)
def test_a_name_that_no_url_can_hold_is_an_error(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError) as error:
        parse_sources([word], Path(), tmp_path, allow_unverified=False)
    assert str(error.value).startswith(f"{word}: got ")


def test_an_invalid_registry_address_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected models:/NAME@ALIAS"):
        parse_sources(["digits=models:/mnist-bn"], Path(), tmp_path, allow_unverified=False)


def test_the_command_reports_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    status, err = commands.run(tmp_path, "mnist-bn", "serve", "--port=0", "models/\udcff.onnx")
    assert status == 2
    assert err.startswith("error: models/\\udcff.onnx: got")
