"""TODO."""

import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from mnist_batchnorm.artifacts.curves import write_curve
from mnist_batchnorm.core.errors import CheckFailedError, UserError, as_users_mistake
from mnist_batchnorm.core.files import digest, write_json
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import MODELS, REPORTS, SPLITS

Tell = Callable[[dict[str, Any]], None]

LEARNT = {name: SPLITS[name] for name in ("train", "valid")}


def work(variant: str, tell: Tell) -> None:
    """Train one network; write its weights, learning curve and last epoch's metrics.

    Args:
        variant: ``bn`` or ``plain``.
        tell: takes the events that `Training.hear` understands.
    """
    gc.disable()  # a fifth of the time that PyTorch takes to import; see cli.py
    params = load_params().train
    if params.portable:
        from mnist_batchnorm.training.reproducible import make_portable

        make_portable()
    from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
    from mnist_batchnorm.training.checkpoint import Unfinished, identity
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
    train, valid = (DeviceSplit.load(path, device) for path in LEARNT.values())
    asked = params.model_dump(mode="json", exclude={"device"})  # auto or cpu: the same
    unfinished = Unfinished(variant, identity({"variant": variant, **asked}, LEARNT, device))
    tell(
        {
            "device": str(device),
            "described": describe_device(device),
            "steps": steps_per_epoch(len(train.labels), params.batch_size),
            "epochs": params.epochs,
            "checkpoint": str(unfinished.path),
        }
    )
    network = architecture(variant, params)
    model = network.build(params.seed).to(device)
    curve = fit(
        model,
        train,
        valid,
        params,
        on_epoch=lambda epoch: tell({"row": asdict(epoch), "kept": unfinished.epochs}),
        progress=lambda taken: tell({"taken": taken}),
        unfinished=unfinished,
    )
    provenance = {
        "variant": variant,
        "train_sha256": digest(SPLITS["train"]),
        "params": asked,
        "device": device.type,
    }
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_checkpoint(MODELS / f"{variant}.safetensors", Checkpoint(network, state, provenance))
    write_curve(REPORTS / f"curves/{variant}.csv", curve)
    last = {"device": device.type, "torch": version("torch"), **asdict(curve[-1])}
    write_json(REPORTS / f"metrics/train-{variant}.json", last)


def main(variant: str) -> int:
    """Run `work`, tell its events on standard output, and its errors as the last of them."""
    # whatever a library prints is not for the reader of events
    with os.fdopen(os.dup(1), "wb", buffering=0) as events:
        os.dup2(2, 1)

        def tell(event: dict[str, Any]) -> None:
            events.write(json.dumps(event).encode() + b"\n")

        try:
            work(variant, tell)
        except (UserError, CheckFailedError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError):  # who started this is gone
                return 1
            known = as_users_mistake(error)
            if known is None:
                raise
            tell({"error": type(known).__name__, "message": str(known)})
            return 1
    return 0
