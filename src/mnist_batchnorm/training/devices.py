"""Devices: choice, determinism, and the data on a device."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError


@dataclass(frozen=True)
class DeviceSplit:
    """A split as tensors on a device."""

    inputs: Tensor  # float32 [n, 784], pixel / 255
    labels: Tensor  # int64 [n]

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "DeviceSplit":
        """Read a prepared split onto the device."""
        split = load_split(path)
        inputs = torch.from_numpy(network_input(split.images))
        labels = torch.from_numpy(split.labels.astype("int64"))
        return cls(inputs.to(device), labels.to(device))


def resolve_device(name: str) -> torch.device:
    """Return the device that ``train.device`` names; a UserError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"params.yaml: train.device: {name}: this PyTorch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()} CUDA GPUs; use auto or cpu"
        )
    return device


def describe_device(device: torch.device) -> str:
    """Name a device for people: ``cpu`` or ``cuda:0 (NVIDIA …)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def make_deterministic() -> None:
    """Make the same seed give the same weights, bit for bit, on the same kind of machine."""
    # cuBLAS reads it at its first call:
    # https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.use_deterministic_algorithms(True), but without 1.4 s for importing a compiler
    torch.set_deterministic_debug_mode("error")
    # skip filling memory with NaN that is written next anyway
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)  # these layers are too small to split, and sums keep one order
