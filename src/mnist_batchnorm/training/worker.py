"""The process that trains one network: ``python -m mnist_batchnorm.training.worker VARIANT``.

`training.processes` starts it and reads its events.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from mnist_batchnorm.artifacts.curves import write_curve
from mnist_batchnorm.artifacts.metrics import TrainMetrics, write_train_metrics
from mnist_batchnorm.core.child import messages_to_parent
from mnist_batchnorm.core.errors import CheckFailedError, UserError, as_expected_error
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import CHECKPOINTS, SPLITS

TRAINING_DATA = {name: SPLITS[name] for name in ("train", "valid")}


def train_network(variant: str, send: Callable[[dict[str, Any]], None]) -> None:
    """Train one network; write its weights, learning curve and last epoch's metrics.

    Args:
        variant: ``bn`` or ``plain``.
        send: called with the events that `NetworkProcess.on_event` handles.
    """
    gc.disable()  # a fifth of the time that PyTorch takes to import; see cli.py
    params = load_params().train
    if params.portable:
        from mnist_batchnorm.training.reproducible import make_reproducible

        make_reproducible()
    from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
    from mnist_batchnorm.training.checkpoint import TrainingCheckpoint, cache_key
    from mnist_batchnorm.training.devices import (
        DeviceSplit,
        describe_device,
        make_deterministic,
        resolve_device,
    )
    from mnist_batchnorm.training.loop import architecture, fit, steps_per_epoch

    gc.enable()
    device = resolve_device("cpu" if params.portable else params.device)
    make_deterministic()
    train, valid = (DeviceSplit.load(path, device) for path in TRAINING_DATA.values())
    # not the device: auto and cpu give the same files
    hyperparameters = params.model_dump(mode="json", exclude={"device"})
    key = cache_key({"variant": variant, **hyperparameters}, TRAINING_DATA, device)
    checkpoint = TrainingCheckpoint(variant, key)
    send(
        {
            "device": str(device),
            "described": describe_device(device),
            "steps": steps_per_epoch(len(train.labels), params.batch_size),
            "epochs": params.epochs,
            "checkpoint": str(checkpoint.path),
        }
    )
    network = architecture(variant, params)
    model = network.build(params.seed).to(device)
    curve = fit(
        model,
        train,
        valid,
        params,
        on_epoch=lambda epoch: send({"row": asdict(epoch), "kept": checkpoint.epochs}),
        progress=lambda taken: send({"taken": taken}),
        checkpoint=checkpoint,
    )
    provenance = {
        "variant": variant,
        "train_sha256": digest(SPLITS["train"]),
        "params": hyperparameters,
        "device": device.type,
    }
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_checkpoint(CHECKPOINTS[variant], Checkpoint(network, state, provenance))
    write_curve(variant, curve)
    metrics = TrainMetrics(device=device.type, torch=version("torch"))
    write_train_metrics(variant, metrics, curve[-1])


def main(variant: str) -> int:
    """Run `train_network`, send its events to the parent, and an expected error as the last."""
    with messages_to_parent() as send:
        try:
            train_network(variant, send)
        except BrokenPipeError:  # the parent has ended
            return 1
        except (UserError, CheckFailedError, OSError, MemoryError, RuntimeError) as error:
            expected = as_expected_error(error)
            if expected is None:
                raise
            send({"error": type(expected).__name__, "message": str(expected)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
