"""What the pipeline's files are called and where they lie, seen from the folder of dvc.yaml."""

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
CHECKPOINT = CHECKPOINTS["bn"]  # of the network that is registered


@dataclass(frozen=True)
class Exported:
    """What an ONNX file is: which of the two networks, and whether its batch norm is folded."""

    variant: str
    folded: bool = False


GRAPHS = {  # in models/
    "bn.onnx": Exported("bn"),
    "bn-folded.onnx": Exported("bn", folded=True),
    "plain.onnx": Exported("plain"),
}

# Registered name -> its file in models/. Both are one network, so they share every version number;
# plain.onnx is there to be compared with, and is no candidate.
REGISTERED = {"mnist-bn": "bn.onnx", "mnist-bn-folded": "bn-folded.onnx"}
SERVED = {**REGISTERED, "mnist-plain": "plain.onnx"}  # likewise, of what a server answers for
REGISTRY = MODELS / "registry.json"  # which version is champion, and why; in git

REPORTS = Path("reports")
PARITY = REPORTS / "parity.json"  # what the gate says of the files
PROMOTION = REPORTS / "promotion.json"
SYNCED = REPORTS / "synced.json"
SEEDS = REPORTS / "metrics/seeds.json"
SEED_CURVES = REPORTS / "curves/seeds.csv"

CHECKPOINT_KEY = "mnist_batchnorm"  # in a checkpoint's metadata
WEIGHTS_KEY = "mnist_batchnorm.weights_sha256"  # in an ONNX file's metadata_props

UNFINISHED = Path(".checkpoints")  # of training runs, in the `repository`


def repository() -> Path:
    """Return the folder of what outlives a working copy: MLflow's store, unfinished runs.

    DVC sets DVC_ROOT for its stages; for ``dvc exp run --temp`` and ``--queue`` it is the
    repository that the experiment was started from, not the temporary copy.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
