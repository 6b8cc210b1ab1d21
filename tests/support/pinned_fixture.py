"""Make the pinned fixtures: ``python -m tests.support.pinned_fixture`` after ``dvc repro prepare``.

Trains the small network, chooses the images and computes the golden logits; goldens/README.md
describes the files. The same machine and the same versions write the same bytes.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from mnist_batchnorm.artifacts.goldens import PinnedOutputs, pinned_images, write_pinned_outputs
from mnist_batchnorm.artifacts.splits import CLASSES, Split, load_split, network_input, save_split
from mnist_batchnorm.core.arrays import Float32, Float64
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import TrainParams
from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
from mnist_batchnorm.promotion.goldens import margins
from mnist_batchnorm.training.devices import DeviceSplit, make_deterministic, resolve_device
from mnist_batchnorm.training.loop import architecture, fit

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/fixtures/regression"
CHECKPOINT = HERE / "checkpoint.safetensors"
IMAGES = ROOT / "goldens/images.safetensors"
GOLDENS = HERE / "goldens.json"

PREPARED = ROOT / "data/prepared"

PARAMS = TrainParams(
    seed=0,
    hidden=(16, 12),  # unequal, so that no tensor fits another's place
    epochs=2,
    batch_size=32,
    lr=0.01,
    bn_momentum=0.1,
    bn_eps=1e-2,  # not ONNX's default 1e-5, so that an export that loses it shows
    device="cpu",
    portable=False,
)

# Images of each digit: the first of the file, and those nearest to the decision boundary. Last,
# over all digits, the most confident mistakes. 64 together.
TYPICAL, BOUNDARY, MISREAD = 3, 3, 4

# Smallest margin between the two largest logits, relative to the largest: 100 times the effect of
# rounding, so that no correct runtime predicts another class.
CLEAR_MARGIN = 1e-3


def train_network(path: Path) -> None:
    """Train the small network with the project's own loop."""
    device = resolve_device(PARAMS.device)
    make_deterministic()
    train_file, valid_file = PREPARED / "train.safetensors", PREPARED / "valid.safetensors"
    network = architecture("bn", PARAMS)
    model = network.build(PARAMS.seed)
    fit(model, DeviceSplit.load(train_file, device), DeviceSplit.load(valid_file, device), PARAMS)
    provenance = {
        "variant": "bn",
        "train_sha256": digest(train_file),
        "params": PARAMS.model_dump(mode="json"),
        "device": device.type,
    }
    save_checkpoint(path, Checkpoint(network, model.state_dict(), provenance))


def float64_logits(checkpoint: Path, inputs: Float32) -> Float32:
    """Compute the checkpoint's logits from the definition, without PyTorch or ONNX.

    Batch norm in inference is gamma (x - mean) / sqrt(var + eps) + beta with the running
    statistics (Ioffe & Szegedy 2015, algorithm 2).

    Args:
        checkpoint: a network of `PARAMS`.
        inputs: ``[n, 784]``.

    Returns:
        ``[n, 10]``, float64 arithmetic rounded once.
    """
    state = {name: array.astype(np.float64) for name, array in load_file(checkpoint).items()}
    x: Float64 = inputs.astype(np.float64)
    for i in range(1, len(PARAMS.hidden) + 1):
        x = x @ state[f"linear{i}.weight"].T + state[f"linear{i}.bias"]
        deviation = np.sqrt(state[f"bn{i}.running_var"] + PARAMS.bn_eps)
        x = (x - state[f"bn{i}.running_mean"]) / deviation
        x = np.maximum(state[f"bn{i}.weight"] * x + state[f"bn{i}.bias"], 0)
    last = len(PARAMS.hidden) + 1
    logits = x @ state[f"linear{last}.weight"].T + state[f"linear{last}.bias"]
    return logits.astype(np.float32)


def choose(split: Split, logits: Float32) -> npt.NDArray[np.int64]:
    """Return the positions of 64 images: typical, near the boundary, misread; ascending."""
    margin = margins(logits) / np.abs(logits).max(axis=1)
    wrong = logits.argmax(axis=1) != split.labels
    chosen = np.zeros(len(split), dtype=np.bool_)
    for digit in range(CLASSES):
        chosen[np.flatnonzero(split.labels == digit)[:TYPICAL]] = True
    for digit in range(CLASSES):
        usable = np.flatnonzero((split.labels == digit) & (margin > CLEAR_MARGIN) & ~chosen)
        chosen[usable[np.argsort(margin[usable], kind="stable")[:BOUNDARY]]] = True
    mistakes = np.flatnonzero(wrong & ~chosen)
    chosen[mistakes[np.argsort(-margin[mistakes], kind="stable")[:MISREAD]]] = True
    return np.flatnonzero(chosen)


def main() -> None:
    """Write the three files."""
    train_network(CHECKPOINT)
    test = load_split(PREPARED / "test.safetensors")
    chosen = choose(test, float64_logits(CHECKPOINT, network_input(test.images)))
    fixture = Split(test.images[chosen], test.labels[chosen], test.index[chosen])
    save_split(IMAGES, fixture)
    logits = float64_logits(CHECKPOINT, network_input(fixture.images))
    write_pinned_outputs(
        GOLDENS,
        PinnedOutputs(
            computed_by="float64 NumPy from checkpoint.safetensors",
            weights_sha256=digest(CHECKPOINT),
            onnx_sha256={},
            images_sha256=digest(IMAGES),
            images=pinned_images(fixture, logits),
        ),
    )


if __name__ == "__main__":
    main()
