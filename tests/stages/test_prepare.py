import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.splits import Split, load_split
from mnist_batchnorm.core.params import PrepareParams
from mnist_batchnorm.stages.prepare import prepare
from tests.conftest import MnistBn

SPLITS = ("train", "valid", "test")


def load(prepared: Path) -> dict[str, Split]:
    return {name: load_split(prepared / f"{name}.safetensors") for name in SPLITS}


def test_metrics_are_true(raw: Path, prepared: Path) -> None:
    splits = load(prepared)
    pixels = splits["train"].images / 255
    content = json.loads((prepared / "data.json").read_text())
    assert content.pop("train_pixel_mean") == pytest.approx(pixels.mean(), rel=1e-12)
    assert content.pop("train_pixel_std") == pytest.approx(pixels.std(), rel=1e-12)
    assert content == {
        "protocol": "valid: 200 training images held out",
        "images": {"train": 1800, "valid": 200, "test": 500},
        "per_class": {
            name: {str(digit): int((split.labels == digit).sum()) for digit in range(10)}
            for name, split in splits.items()
        },
        "sha256": {
            "raw": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in raw.iterdir()
            },
            "prepared": {
                name: hashlib.sha256((prepared / f"{name}.safetensors").read_bytes()).hexdigest()
                for name in SPLITS
            },
        },
    }


def test_same_seed_makes_the_same_files(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path, tmp_path / "data.json", PrepareParams(valid_size=200, seed=0))
    for path in prepared.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_another_seed_holds_out_other_images(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path, tmp_path / "data.json", PrepareParams(valid_size=200, seed=1))
    ours, theirs = (set(load(folder)["valid"].index) for folder in (tmp_path, prepared))
    assert len(ours & theirs) < 60  # 20 expected of two independent draws
    facts, others = (
        json.loads((folder / "data.json").read_text()) for folder in (tmp_path, prepared)
    )
    assert facts["per_class"] == others["per_class"]


def test_command_says_that_valid_is_test(project: Path, raw: Path, mnist_bn: MnistBn) -> None:
    shutil.copytree(raw, project / "data/raw")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("valid_size: 5000", "valid_size: 0"))
    done = mnist_bn("prepare")
    assert done.status == 0
    assert "valid = the test images" in done.err
    assert load(project / "data/prepared")["valid"].images.shape == (500, 28, 28)
    facts = json.loads((project / "reports/metrics/data.json").read_text())
    assert "not independent of test" in facts["protocol"]


def test_command_refuses_a_split_that_is_too_large(
    project: Path, raw: Path, mnist_bn: MnistBn
) -> None:
    shutil.copytree(raw, project / "data/raw")
    done = mnist_bn("prepare")  # 5,000 of the slice's 2,000
    assert done.status == 2
    assert "prepare.valid_size" in done.err
    assert not (project / "data/prepared").exists()
