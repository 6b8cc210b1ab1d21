"""Checkpoints of unfinished trainings: after each epoch, the complete state of the run.

They lie outside the outputs of every stage, which DVC deletes before the stage runs. Each is named
by a key of everything that determines the run, so that a run with other data, parameters, code or
another kind of machine never resumes from it.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mnist_batchnorm.core.files import digest, fingerprint, write_bytes
from mnist_batchnorm.core.paths import TRAINING_CHECKPOINTS, repository
from mnist_batchnorm.training.devices import describe_device

PACKAGE = Path(__file__).parents[1]
# The code that determines the bits of a training. The artifacts that a training only writes, and
# everything else, may change without invalidating a checkpoint.
CODE = ("core", "network", "training", "artifacts/splits.py")
METADATA_KEY = "mnist_batchnorm"
GENERATORS = "generators"
# environment variables that choose among the kernels of PyTorch, MKL, oneDNN, glibc and cuBLAS
KERNEL_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_",
    "DNNL_",
    "GLIBC_TUNABLES",
    "MKL_",
    "NVIDIA_TF32",
    "ONEDNN_",
    "TORCH_ALLOW_TF32",
)


def cache_key(params: Mapping[str, Any], data: Mapping[str, Path], device: torch.device) -> str:
    """Return the SHA-256 of everything that determines the bits of a training.

    ``params`` are the variant, hyperparameters and seeds, ``data`` the data files by role.
    """
    return fingerprint(
        {
            "params": dict(params),
            "data": {role: digest(path) for role, path in data.items()},
            "code": {path.relative_to(PACKAGE).as_posix(): digest(path) for path in code_files()},
            "torch": torch.__config__.show(),
            "device": describe_device(device),
            "processor": [processor(), torch.backends.cpu.get_cpu_capability()],
            "kernels": {k: v for k, v in os.environ.items() if k.startswith(KERNEL_VARIABLES)},
            "threads": torch.get_num_threads(),
        }
    )


def code_files() -> list[Path]:
    """Return the source files that `CODE` names."""
    files: list[Path] = []
    for path in (PACKAGE / name for name in CODE):
        files.extend(path.rglob("*.py") if path.is_dir() else [path])
    return sorted(files)


def processor() -> str:
    """Return the processor's model, without what varies over time."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    fields = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return "; ".join(dict.fromkeys(line for line in lines if line.startswith(fields)))


class TrainingCheckpoint:
    """The checkpoint file of one run, which need not exist, and its number of epochs."""

    def __init__(self, name: str, key: str) -> None:
        """Create the handle of run `name` (for people, ``bn``) with this `cache_key`."""
        self.path = repository() / TRAINING_CHECKPOINTS / f"{name}-{key[:16]}.safetensors"
        self.epochs = 0
        self._key = key

    def save(
        self,
        tensors: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Atomically replace the file with the state after an epoch.

        If that fails, as on a full disk, a warning is printed and the run continues.
        """
        state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        state[GENERATORS] = torch.stack([generator.get_state() for generator in generators])
        metadata = {"key": self._key, "rows": rows}
        content = serialize(state, {METADATA_KEY: json.dumps(metadata)})
        try:
            write_bytes(self.path, content)
            self.epochs = len(rows)
        except OSError as error:
            click.echo(f"warning: no checkpoint of epoch {len(rows)}: {error}", err=True)

    def restore(
        self, tensors: Mapping[str, Tensor], generators: Sequence[torch.Generator]
    ) -> list[dict[str, Any]]:
        """Fill a new trainer and its generators in place with the saved state.

        Returns:
            The saved rows; none, and nothing filled, if there is no usable checkpoint.
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
            restored = [_generator(saved) for saved in state[GENERATORS]]
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
        for generator, saved in zip(generators, restored, strict=True):
            generator.set_state(saved.get_state())
        self.epochs = len(rows)
        click.echo(f"going on after epoch {self.epochs}, from {self.path}", err=True)
        return rows


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state.clone())  # RuntimeError for an invalid state, and for a view
    return generator


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
