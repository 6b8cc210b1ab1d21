import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
from tests.conftest import MnistBn

OUTPUTS = ("reports/metrics/test-{}.json", "reports/confusion/{}.csv", "reports/predictions/{}.csv")


def save_two(folder: Path, trained: Checkpoint) -> None:
    """Save networks whose answers differ; what is in them does not matter here."""
    save_checkpoint(folder / "bn.safetensors", trained)
    state = trained.state | {"linear3.weight": -trained.state["linear3.weight"]}
    save_checkpoint(folder / "plain.safetensors", replace(trained, state=state))


def run(project: Path, mnist_bn: MnistBn) -> tuple[dict[str, Any], dict[Path, bytes]]:
    done = mnist_bn("evaluate", "bn")
    assert done.status == 0, done.err
    metrics = json.loads((project / "reports/metrics/test-bn.json").read_text())
    assert done.out == (
        f"bn: test accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, "
        f"calibration error {metrics['calibration_error']:.4f}\n"
    )
    return metrics, {path: path.read_bytes() for path in project.glob("reports/**/*.*")}


def test_command_measures_the_test_images(
    project: Path, prepared: Path, weights: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    shutil.copytree(weights.parent, project / "models")
    metrics, files = run(project, mnist_bn)
    made = {path.relative_to(project).as_posix() for path in files}
    assert made == {output.format("bn") for output in OUTPUTS}
    test = load_split(prepared / "test.safetensors")
    with torch.no_grad():
        predicted = trained.model()(torch.from_numpy(network_input(test.images))).argmax(dim=1)
    assert metrics["accuracy"] == (predicted.numpy() == test.labels).mean()
    assert metrics["accuracy"] > 0.5  # one epoch on 1,800 images; chance is 0.1
    assert run(project, mnist_bn) == (metrics, files)


def test_command_measures_both_as_it_measures_each(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_two(project / "models", trained)
    both = mnist_bn("evaluate")
    assert both.status == 0, both.err
    files = {path: path.read_bytes() for path in project.glob("reports/**/*.*")}
    assert {path.relative_to(project).as_posix() for path in files} == {
        output.format(variant) for output in OUTPUTS for variant in ("bn", "plain")
    }
    assert len(set(files.values())) == len(files)
    shutil.rmtree(project / "reports")
    each = [mnist_bn("evaluate", variant) for variant in ("bn", "plain")]
    assert both.out == "".join(done.out for done in each)
    assert {path: path.read_bytes() for path in project.glob("reports/**/*.*")} == files


@pytest.mark.parametrize("variants", [["plain"], []])
def test_command_refuses_a_network_that_gives_nan(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn, variants: list[str]
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_checkpoint(project / "models/bn.safetensors", trained)
    state = trained.state | {"linear3.bias": torch.full((10,), torch.nan)}
    save_checkpoint(project / "models/plain.safetensors", replace(trained, state=state))
    done = mnist_bn("evaluate", *variants)
    assert done.status == 1
    assert "models/plain.safetensors gives logits that are not finite" in done.err
    assert not (project / "reports").exists()


@pytest.mark.parametrize(
    ("missing", "stage"),
    [("data/prepared/test", "prepare"), ("models/bn", "train"), ("models/plain", "train")],
)
def test_command_without_its_inputs_says_what_to_run(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn, missing: str, stage: str
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_two(project / "models", trained)
    (project / f"{missing}.safetensors").unlink()
    done = mnist_bn("evaluate")
    assert done.status == 2
    assert done.err == f"error: no {missing}.safetensors; run `dvc repro {stage}` first\n"
    assert not (project / "reports").exists()
