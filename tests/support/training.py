"""A folder to train in on the slice of MNIST, and what training writes there."""

import shutil
from pathlib import Path

from ruamel.yaml import YAML

from mnist_batchnorm.core.paths import VARIANTS
from tests.conftest import ROOT

EPOCHS = 60  # a second or more, long enough to be disturbed at a chosen moment
STEPS = 56  # an epoch, of 32 of the 1,800 images
OUTPUTS = {
    variant: {
        f"models/{variant}.safetensors",
        f"reports/curves/{variant}.csv",
        f"reports/metrics/train-{variant}.json",
    }
    for variant in VARIANTS
}
TRAIN = ("mnist-bn", "train")

Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """What training wrote, including temporary files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for place in ("models", "reports")
        for path in sorted((folder / place).rglob("*"))
        if path.is_file()
    }


def of(variant: str, everything: Files) -> Files:
    return {name: everything[name] for name in OUTPUTS[variant]}


def kept(folder: Path) -> list[str]:
    """Names of the files in .checkpoints, including temporary ones."""
    return sorted(path.name for path in (folder / ".checkpoints").glob("*"))


def set_params(folder: Path, **changed: object) -> None:
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["train"].update(changed)
    yaml.dump(params, folder / "params.yaml")


def make_workspace(folder: Path, prepared: Path, **changed: object) -> Path:
    """A folder to train in: parameters and data. Without dvc.yaml, MLflow is not even imported."""
    (folder / "data/prepared").mkdir(parents=True)
    for split in ("train", "valid"):
        shutil.copy(prepared / f"{split}.safetensors", folder / "data/prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    set_params(folder, **{"epochs": EPOCHS, "device": "cpu", **changed})
    return folder
