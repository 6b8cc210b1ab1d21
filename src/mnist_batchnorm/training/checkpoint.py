"""Checkpoints of runs that have not ended: after each epoch, all that decides the rest of the run.

They lie outside the outputs of every stage, which DVC deletes before the stage runs. Each is named
by what determines the run: one of other data, parameters or code, or of another kind of machine, is
never taken up.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mnist_batchnorm.core.files import digest, write_bytes
from mnist_batchnorm.core.paths import UNFINISHED, repository
from mnist_batchnorm.training.devices import describe_device

SOURCE = Path(__file__).parent
METADATA_KEY = "mnist_batchnorm"
GENERATORS = "generators"
# what chooses among the kernels of PyTorch, MKL, oneDNN, glibc and cuBLAS
DISPATCH = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_",
    "DNNL_",
    "GLIBC_TUNABLES",
    "MKL_",
    "NVIDIA_TF32",
    "ONEDNN_",
    "TORCH_ALLOW_TF32",
)


def identity(params: Mapping[str, Any], data: Mapping[str, Path], device: torch.device) -> str:
    """Return the SHA-256 of all that decides a training run, bit for bit.

    Args:
        params: what was asked for: variant, hyperparameters, seeds.
        data: the files that it learns from and watches, by their role.
        device: where it runs.
    """
    content = {
        "params": dict(params),
        "data": {role: digest(path) for role, path in data.items()},
        "code": {
            path.relative_to(SOURCE).as_posix(): digest(path)
            for path in sorted(SOURCE.rglob("*.py"))
        },
        "torch": torch.__config__.show(),
        "device": describe_device(device),
        "processor": [processor(), torch.backends.cpu.get_cpu_capability()],
        "dispatch": {k: v for k, v in sorted(os.environ.items()) if k.startswith(DISPATCH)},
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def processor() -> str:
    """Name the processor's model as precisely as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    kind = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return "; ".join(dict.fromkeys(line for line in lines if line.startswith(kind)))


class Unfinished:
    """The checkpoint of one run.

    Attributes:
        path: its file, which need not exist.
        epochs: how many epochs the file holds, 0 while there is none.
    """

    def __init__(self, name: str, key: str) -> None:
        """Name the checkpoint.

        Args:
            name: for people, ``bn``.
            key: the run's `identity`.
        """
        self.path = repository() / UNFINISHED / f"{name}-{key[:16]}.safetensors"
        self.epochs = 0
        self._key = key

    def keep(
        self,
        tensors: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the state after an epoch in place of the one before, whole or not at all.

        A disk that is full costs the checkpoint, with a warning, and not the run.

        Args:
            tensors: the trainer's.
            generators: of the batches' order, one a replica.
            rows: what was measured after each epoch so far.
        """
        state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        state[GENERATORS] = torch.stack([generator.get_state() for generator in generators])
        metadata = {"key": self._key, "rows": rows}
        content = save(state, {METADATA_KEY: json.dumps(metadata)})
        try:
            write_bytes(self.path, content)
            self.epochs = len(rows)
        except OSError as error:
            click.echo(f"warning: no checkpoint of epoch {len(rows)}: {error}", err=True)

    def restore(
        self, tensors: Mapping[str, Tensor], generators: Sequence[torch.Generator]
    ) -> list[dict[str, Any]]:
        """Fill a new trainer and its generators with what was kept.

        Args:
            tensors: the trainer's, written in place.
            generators: of the batches' order, one a replica.

        Returns:
            The rows so far, none if nothing was kept: then nothing is filled either.
        """
        try:
            with safe_open(self.path, framework="pt") as stored:
                metadata = json.loads(stored.metadata()[METADATA_KEY])
                rows: list[dict[str, Any]] = metadata["rows"]
                state = {name: stored.get_tensor(name) for name in [*tensors, GENERATORS]}
            if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
                raise ValueError("its epochs are not in order")
            if metadata["key"] != self._key:
                raise ValueError("it is of another run")
            if any(_form(state[name]) != _form(tensor) for name, tensor in tensors.items()):
                raise ValueError("its tensors have other shapes or types")
            orders = [_generator(kept) for kept in state[GENERATORS]]
        except FileNotFoundError:
            return []
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            click.echo(
                f"warning: {self.path} cannot be used, training starts anew: {error}", err=True
            )
            return []
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])
        for generator, kept in zip(generators, orders, strict=True):
            generator.set_state(kept.get_state())
        self.epochs = len(rows)
        click.echo(f"going on after epoch {self.epochs}, from {self.path}", err=True)
        return rows


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state.clone())  # RuntimeError for what is no state, and for a view as well
    return generator


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
