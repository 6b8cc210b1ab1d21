"""The pipeline's files and folders, relative to the folder of dvc.yaml."""

import os
from dataclasses import dataclass
from pathlib import Path

VARIANTS = ("bn", "plain")  # the two networks

DVC_FILE = Path("dvc.yaml")
LOCK_FILE = Path("dvc.lock")
PARAMS_FILE = Path("params.yaml")

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
SPLITS = {name: PREPARED / f"{name}.safetensors" for name in ("train", "valid", "test")}
TEST_SPLIT = SPLITS["test"]

MODELS = Path("models")
CHECKPOINTS = {variant: MODELS / f"{variant}.safetensors" for variant in VARIANTS}
CHECKPOINT = CHECKPOINTS["bn"]  # of the registered network


@dataclass(frozen=True)
class Exported:
    """The network of an ONNX file, and whether its batch norm is folded."""

    variant: str
    folded: bool = False


GRAPHS = {  # in models/
    "bn.onnx": Exported("bn"),
    "bn-folded.onnx": Exported("bn", folded=True),
    "plain.onnx": Exported("plain"),
}

# Registered name -> its file in models/. Both are the same network and share version numbers;
# plain.onnx is for comparison only.
REGISTERED = {"mnist-bn": "bn.onnx", "mnist-bn-folded": "bn-folded.onnx"}
SERVED = {**REGISTERED, "mnist-plain": "plain.onnx"}  # served model name -> its file
REGISTRY = MODELS / "registry.json"  # the champion and all versions; in git

REPORTS = Path("reports")
PARITY = REPORTS / "parity.json"
PROMOTION = REPORTS / "promotion.json"
SYNCED = REPORTS / "synced.json"
SEEDS = REPORTS / "metrics/seeds.json"
SEED_CURVES = REPORTS / "curves/seeds.csv"

CHECKPOINT_KEY = "mnist_batchnorm"  # in a checkpoint's metadata
WEIGHTS_KEY = "mnist_batchnorm.weights_sha256"  # in an ONNX file's metadata_props

TRAINING_CHECKPOINTS = Path(".checkpoints")  # of unfinished trainings, in the `repository`


def repository() -> Path:
    """Return the folder that outlives a working copy: MLflow's store, training checkpoints.

    DVC sets DVC_ROOT for its stages; for ``dvc exp run --temp`` and ``--queue`` it is the
    repository that the experiment was started from, not the temporary copy.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def in_workspace() -> bool:
    """Whether the current folder is the `repository`, not DVC's copy of it for an experiment."""
    return Path.cwd().resolve() == repository()
