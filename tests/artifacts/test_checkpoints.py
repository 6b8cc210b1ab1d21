import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mnist_batchnorm.artifacts.checkpoints import read_layers, read_train_sha256
from mnist_batchnorm.core.errors import UserError

TENSORS = {
    f"{layer}.{name}": np.full(3, value, np.float32)
    for layer in ("bn1", "bn2", "bn10")
    for name, value in (("running_mean", 1), ("running_var", 4), ("weight", 5), ("bias", 6))
}


def test_layers_are_read_in_their_order(tmp_path: Path) -> None:
    save_file(TENSORS | {"linear1.weight": np.zeros((3, 4), np.float32)}, tmp_path / "bn")
    layers = read_layers(tmp_path / "bn")
    assert list(layers) == ["bn1", "bn2", "bn10"]
    for layer in layers.values():
        assert {name: array.tolist() for name, array in vars(layer).items()} == {
            "mean": [1.0] * 3,
            "deviation": [2.0] * 3,
            "scale": [5.0] * 3,
            "shift": [6.0] * 3,
        }
        assert layer.mean.dtype == np.float64


def test_checkpoint_without_a_statistic_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bn.safetensors"
    kept = {name: array for name, array in TENSORS.items() if name != "bn2.running_var"}
    save_file(kept, path)
    with pytest.raises(UserError, match=r"lacks 'bn2\.running_var'"):
        read_layers(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_layers(path)


def test_hash_of_the_training_images_is_in_the_metadata(tmp_path: Path) -> None:
    metadata = {"mnist_batchnorm": json.dumps({"provenance": {"train_sha256": "1" * 64}})}
    save_file(TENSORS, tmp_path / "bn", metadata)
    assert read_train_sha256(tmp_path / "bn") == "1" * 64


@pytest.mark.parametrize("metadata", [None, {"mnist_batchnorm": "[]"}, {"mnist_batchnorm": "{}"}])
def test_foreign_file_has_no_hash(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "bn", metadata)
    with pytest.raises(UserError, match="bn is not a checkpoint of this project"):
        read_train_sha256(tmp_path / "bn")


def test_missing_checkpoint_names_the_stage_to_run(tmp_path: Path) -> None:
    for read in (read_layers, read_train_sha256):
        with pytest.raises(UserError, match=r"no .*bn; run `dvc repro train` first"):
            read(tmp_path / "bn")
