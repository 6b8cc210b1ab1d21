"""Stage train: both networks at once, each in a process of its own, shown and recorded by this one.

The process of a network is ``python -m mnist_batchnorm.train VARIANT``; it tells of its progress in
JSON lines. This one imports neither PyTorch nor MLflow.
"""

import csv
import gc
import io
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from mnist_batchnorm.errors import CheckFailedError, UserError, as_users_mistake
from mnist_batchnorm.files import digest, discard, write_json, write_text
from mnist_batchnorm.layout import MODELS, REPORTS, SPLITS, VARIANTS
from mnist_batchnorm.params import load_params
from mnist_batchnorm.tracking import LiveRuns, live_runs

if TYPE_CHECKING:
    from mnist_batchnorm.fit import Epoch

Tell = Callable[[dict[str, Any]], None]

LEARNT = {name: SPLITS[name] for name in ("train", "valid")}


# --- the process of one network ------------------------------------------------------------------


def work(variant: str, tell: Tell) -> None:
    """Train one network; write its weights, learning curve and last epoch's metrics.

    Args:
        variant: ``bn`` or ``plain``.
        tell: takes the events that `Training.hear` understands.
    """
    gc.disable()  # a fifth of the time that PyTorch takes to import; see cli.py
    params = load_params().train
    if params.portable:
        from mnist_batchnorm.portable import make_portable

        make_portable()
    from mnist_batchnorm.fit import (
        DeviceSplit,
        architecture,
        describe_device,
        fit,
        make_deterministic,
        resolve_device,
        steps_per_epoch,
    )
    from mnist_batchnorm.model import Checkpoint, save_checkpoint
    from mnist_batchnorm.resume import Unfinished, identity

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


def write_curve(path: Path, curve: "Sequence[Epoch]") -> None:
    """Write the learning curve as CSV, one row an epoch."""
    text = io.StringIO()
    rows = [asdict(epoch) for epoch in curve]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


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


# --- the process that shows them ------------------------------------------------------------------


class Training:
    """One network's process, as seen from here.

    Attributes:
        variant: ``bn`` or ``plain``.
        process: trains it.
        events: what it tells, closed with its end.
        checkpoint: file of its state after the last whole epoch; empty until it is known.
        kept: how many epochs that file holds.
        error: what ended it.
    """

    def __init__(self, variant: str) -> None:
        """Start it."""
        self.variant = variant
        self.checkpoint = ""
        self.kept = 0
        self.error: Exception | None = None
        self._epochs = 0
        # -P: import the installed package, whatever lies in the working directory. A session of
        # its own: Ctrl-C is for this process, which stops that one.
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "mnist_batchnorm.train", variant],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.events = self.process.stdout

    def hear(self, event: dict[str, Any], tracker: LiveRuns, bar: "tqdm[Any]") -> None:
        """Show and record what it tells."""
        match event:
            case {"taken": taken}:
                bar.update(taken)
            case {"row": row, "kept": kept}:
                self.kept = kept
                tqdm.write(
                    f"{self.variant:5}  epoch {row['epoch']:>{len(str(self._epochs))}}"
                    f"/{self._epochs}"
                    f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.4f}"
                    f"  valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.4f}",
                    file=sys.stderr,
                )
                tracker.log_epoch(self.variant, row)
            case {"device": device, "described": described, "epochs": epochs, "steps": steps}:
                self._epochs = epochs
                self.checkpoint = event["checkpoint"]
                bar.total += epochs * steps
                tqdm.write(f"training {self.variant} on {described}", file=sys.stderr)
                tracker.begin(self.variant, device)
            case {"error": "UserError", "message": message}:
                self.error = UserError(message)
            case {"error": _, "message": message}:
                self.error = CheckFailedError(message)

    def ended(self, tracker: LiveRuns) -> None:
        """Find out how it ended."""
        status = self.process.wait()
        self.events.close()
        tracker.end(self.variant, "FAILED" if status else "FINISHED")
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            self.error = CheckFailedError(f"its process was ended by {name}{hint}")
        elif status and not self.error:
            self.error = CheckFailedError(f"its process ended with status {status}")

    def stop(self) -> None:
        """Stop it at once, wherever it is: its files are whole at every moment.

        Not by SIGINT, an exception, which PyTorch swallows while it imports NumPy.
        """
        self.process.kill()  # of no effect when it has ended by itself
        self.process.wait()
        self.events.close()

    def where(self) -> str:
        """Say where the same command would go on."""
        if not self.checkpoint:
            return f"{self.variant} had not begun"
        if not self.kept:
            return f"{self.variant} has no whole epoch yet"
        return f"{self.variant} goes on after epoch {self.kept}, from {self.checkpoint}"


def told(trainings: Sequence[Training]) -> Iterator[tuple[Training, dict[str, Any]]]:
    """Yield what the processes tell, as it comes, until all have ended."""
    with selectors.DefaultSelector() as selector:
        rest = dict.fromkeys(trainings, b"")
        for training in trainings:
            selector.register(training.events, selectors.EVENT_READ, training)
        while selector.get_map():
            for key, _ in selector.select():
                training = key.data
                chunk = os.read(key.fd, 1 << 16)
                *lines, rest[training] = (rest[training] + chunk).split(b"\n")
                for line in lines:
                    yield training, json.loads(line)
                if not chunk:
                    selector.unregister(key.fileobj)
                    yield training, {"ended": True}


def train(variants: Sequence[str], tracker: LiveRuns) -> None:
    """Train networks side by side, each to its files; one that fails does not stop the other.

    Raises:
        CheckFailedError: A loss is no longer finite, or a process was ended.
        UserError: A network could not be trained for another reason.
        KeyboardInterrupt: After all have been stopped.
    """
    trainings = [Training(variant) for variant in variants]
    with tqdm(total=0, unit="step", disable=None) as bar:
        try:
            for training, event in told(trainings):
                if "ended" in event:
                    training.ended(tracker)
                else:
                    training.hear(event, tracker, bar)
        except BaseException as error:
            for training in trainings:
                training.stop()
            if isinstance(error, KeyboardInterrupt):
                bar.close()
                for training in trainings:
                    click.echo(training.where(), err=True)
            raise
    if failed := [training for training in trainings if training.error]:
        mistake = all(isinstance(training.error, UserError) for training in failed)
        text = "\n".join(
            f"{training.variant}: {training.error}"
            + (f"; {training.where()}" if training.kept else "")
            for training in failed
        )
        raise (UserError if mistake else CheckFailedError)(text)
    for training in trainings:
        discard(Path(training.checkpoint))


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS), metavar="[bn] [plain]")
@click.option(
    "--seeds", type=click.IntRange(2, 10_000), metavar="N", help="Seeds 0 to N-1; see below."
)
def command(variants: tuple[str, ...], seeds: int | None) -> None:
    """Train the networks; write their weights, learning curves and last epochs' metrics.

    Both at once, or those named. What is interrupted goes on after its last whole epoch when the
    same command runs again, to the same result, bit for bit.

    With --seeds, train both from N seeds instead, as one computation each, and write how far their
    accuracies differ to reports/metrics/seeds.json, as `mnist-bn seeds` does.
    """
    if seeds and variants:
        raise click.UsageError("--seeds trains both networks: leave their names out")
    load_params()  # so that a mistake in it is told once
    if seeds:
        from mnist_batchnorm.seeds import run

        run(seeds)
        return
    with live_runs() as tracker:
        train(list(dict.fromkeys(variants or VARIANTS)), tracker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
