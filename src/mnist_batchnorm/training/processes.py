"""The parent of the training processes: shows their progress, logs it to live tracking, stops them.

It imports neither PyTorch nor MLflow. The process of a network is `training.worker`.
"""

import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mnist_batchnorm.core.child import MessageReader, describe_exit, start_child, stop_child
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import discard
from mnist_batchnorm.training.live import LiveRuns

WORKER = "mnist_batchnorm.training.worker"


class NetworkProcess:
    """The process that trains one network."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.checkpoint = ""  # file of the state after `saved_epochs`, once known
        self.saved_epochs = 0
        self.error: Exception | None = None
        self._epochs = 0
        self._process = start_child(WORKER, variant, stdout=subprocess.PIPE, warnings=True)
        assert self._process.stdout
        self._stdout = self._process.stdout
        self.events = MessageReader(self._stdout.fileno())

    def on_event(self, event: dict[str, Any], tracker: LiveRuns, bar: "tqdm[Any]") -> None:
        match event:
            case {"taken": steps}:
                bar.update(steps)
            case {"row": row, "kept": saved_epochs}:
                self.saved_epochs = saved_epochs
                tqdm.write(
                    f"{self.variant:5}  epoch {row['epoch']:>{len(str(self._epochs))}}"
                    f"/{self._epochs}"
                    f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.4f}"
                    f"  valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.4f}",
                    file=sys.stderr,
                )
                tracker.log_epoch(self.variant, row)
            case {"device": device, "described": description, "epochs": epochs, "steps": steps}:
                self._epochs = epochs
                self.checkpoint = event["checkpoint"]
                bar.total += epochs * steps
                tqdm.write(f"training {self.variant} on {description}", file=sys.stderr)
                tracker.begin(self.variant, device)
            case {"error": "UserError", "message": message}:
                self.error = UserError(message)
            case {"error": _, "message": message}:
                self.error = CheckFailedError(message)

    def on_exit(self, tracker: LiveRuns) -> None:
        status = self._process.wait()
        self._stdout.close()
        tracker.end(self.variant, "FAILED" if status else "FINISHED")
        if status < 0 or (status and not self.error):
            self.error = CheckFailedError(f"its process {describe_exit(status)}")

    def kill(self) -> None:
        """Kill the process: its files are complete at every moment.

        SIGINT would not do: PyTorch swallows the exception while it imports NumPy.
        """
        stop_child(self._process)
        self._stdout.close()

    def resume_point(self) -> str:
        if not self.checkpoint:
            return f"{self.variant} had not begun"
        if not self.saved_epochs:
            return f"{self.variant} has no whole epoch yet"
        return f"{self.variant} goes on after epoch {self.saved_epochs}, from {self.checkpoint}"


def read_events(
    processes: Sequence[NetworkProcess],
) -> Iterator[tuple[NetworkProcess, dict[str, Any] | None]]:
    """Yield events as they arrive, and None when a process closes its pipe, until all have."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.events, selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select():
                process = key.data
                events = process.events.read()
                if events is None:
                    selector.unregister(key.fileobj)
                    events = [None]
                for event in events:
                    yield process, event


def train_in_parallel(variants: Sequence[str], tracker: LiveRuns) -> None:
    """Train networks in parallel; one that fails does not stop the others.

    Raises:
        CheckFailedError: A loss is no longer finite, or a process was ended.
        UserError: A network could not be trained for another reason.
        KeyboardInterrupt: After all processes have been killed.
    """
    processes = [NetworkProcess(variant) for variant in variants]
    with tqdm(total=0, unit="step", disable=None) as bar:
        try:
            for process, event in read_events(processes):
                if event is None:
                    process.on_exit(tracker)
                else:
                    process.on_event(event, tracker, bar)
        except BaseException as error:
            for process in processes:
                process.kill()
            if isinstance(error, KeyboardInterrupt):
                bar.close()
                for process in processes:
                    click.echo(process.resume_point(), err=True)
            raise
    if failed := [process for process in processes if process.error]:
        only_mistakes = all(isinstance(process.error, UserError) for process in failed)
        text = "\n".join(
            f"{process.variant}: {process.error}"
            + (f"; {process.resume_point()}" if process.saved_epochs else "")
            for process in failed
        )
        raise (UserError if only_mistakes else CheckFailedError)(text)
    for process in processes:
        discard(Path(process.checkpoint))
