"""TODO."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import discard
from mnist_batchnorm.training.live import LiveRuns


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
            [sys.executable, "-P", "-m", "mnist_batchnorm.training.worker", variant],
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
