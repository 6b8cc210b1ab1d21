"""What the earlier stages left on disk: read, checked, and checked against each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mnist_batchnorm.artifacts.metrics import DataMetrics
from mnist_batchnorm.artifacts.network_results import Network, read_network
from mnist_batchnorm.artifacts.parity_report import Parity, read_parity
from mnist_batchnorm.artifacts.reading import Floats, read_record
from mnist_batchnorm.artifacts.seeds import SeedRuns, read_seeds
from mnist_batchnorm.artifacts.splits import Split, load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params, load_params
from mnist_batchnorm.core.paths import (
    CHECKPOINT,
    CHECKPOINTS,
    GRAPHS,
    MODELS,
    PARITY,
    REPORTS,
    TEST_SPLIT,
    VARIANTS,
)


@dataclass(frozen=True)
class LayerStatistics:
    """One batch-norm layer, a value for each of its units.

    Attributes:
        mean: running mean of what arrives.
        deviation: square root of the running variance.
        scale: learned gamma, the deviation of what leaves.
        shift: learned beta, the mean of what leaves.
    """

    mean: Floats
    deviation: Floats
    scale: Floats
    shift: Floats


@dataclass(frozen=True)
class ModelFile:
    """A file that ships: its name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Results:
    """Everything that the report is made from."""

    params: Params
    data: DataMetrics
    test: Split
    networks: dict[str, Network]
    seeds: SeedRuns
    layers: dict[str, LayerStatistics]
    parity: Parity
    files: list[ModelFile]

    @property
    def lecture(self) -> bool:
        """Whether training was watched on the test images, as the lecture does it."""
        return self.data.protocol.startswith("lecture")

    @property
    def split_labels(self) -> dict[str, str]:
        """What to call the two splits that the learning curves watch."""
        return {"train": "train", "valid": "valid (= test images)" if self.lecture else "valid"}


def read_layers(path: Path) -> dict[str, LayerStatistics]:
    """Read each batch-norm layer's statistics and learned scale and shift from a checkpoint.

    Raises:
        UserError: The file is missing or unreadable, or a layer lacks one of the four.
    """
    suffix = ".running_mean"
    try:
        tensors = {name: t.astype(np.float64) for name, t in load_file(path).items()}
        return {
            (layer := name.removesuffix(suffix)): LayerStatistics(
                mean=mean,
                deviation=np.sqrt(tensors[f"{layer}.running_var"]),
                scale=tensors[f"{layer}.weight"],
                shift=tensors[f"{layer}.bias"],
            )
            for name, mean in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0]))
            if name.endswith(suffix)
        }
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro train` first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of this project: it lacks {error}") from None


def read_results() -> Results:
    """Gather everything the report is made from, in the current folder.

    Raises:
        UserError: An input is missing, malformed, or does not fit the others.
    """
    params = load_params()
    test = load_split(TEST_SPLIT)
    parity = read_parity()
    # commits from before 2026-11-25 do not judge plain.onnx; sync reads those too
    if missing := [name for name in GRAPHS if name not in parity.graphs]:
        raise UserError(f"{PARITY} says nothing about {', '.join(missing)}; run `dvc repro verify`")
    files = [*CHECKPOINTS.values(), *(MODELS / name for name in parity.graphs)]
    return Results(
        params=params,
        data=read_record(REPORTS / "metrics/data.json", DataMetrics, "prepare"),
        test=test,
        networks={variant: read_network(variant, test) for variant in VARIANTS},
        seeds=read_seeds(),
        layers=read_layers(CHECKPOINT),
        parity=parity,
        files=[ModelFile(p.as_posix(), p.stat().st_size, digest(p)) for p in files],
    )
