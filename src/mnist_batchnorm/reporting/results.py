"""The results that the report shows, gathered from the files of the earlier stages."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.checkpoints import LayerStatistics, read_layers
from mnist_batchnorm.artifacts.data_summary import DataSummary, read_data_summary
from mnist_batchnorm.artifacts.network_results import NetworkResults, read_network
from mnist_batchnorm.artifacts.parity_report import Parity, read_parity
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
    TEST_SPLIT,
    VARIANTS,
)


@dataclass(frozen=True)
class ModelFile:
    """A published file: its path, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Results:
    """The content of the report."""

    params: Params
    data: DataSummary
    test: Split
    networks: dict[str, NetworkResults]
    seeds: SeedRuns
    layers: dict[str, LayerStatistics]
    parity: Parity
    files: list[ModelFile]

    @property
    def lecture(self) -> bool:
        """Whether the valid images are the test images, as in the lecture."""
        return self.data.protocol.startswith("lecture")

    @property
    def split_labels(self) -> dict[str, str]:
        """The names of the two splits of the learning curves."""
        return {"train": "train", "valid": "valid (= test images)" if self.lecture else "valid"}

    def right(self, variant: str) -> npt.NDArray[np.bool_]:
        """Whether a network predicts each test image's class, ``[n]``."""
        right: npt.NDArray[np.bool_] = self.networks[variant].predicted == self.test.labels
        return right


def read_results() -> Results:
    """Gather the results in the current folder.

    Raises:
        UserError: An input is missing, malformed, or does not fit the others.
    """
    test = load_split(TEST_SPLIT)
    parity = read_parity()
    # commits from before 2026-11-25 do not judge plain.onnx; sync reads those too
    if missing := [name for name in GRAPHS if name not in parity.graphs]:
        raise UserError(f"{PARITY} says nothing about {', '.join(missing)}; run `dvc repro verify`")
    files = [*CHECKPOINTS.values(), *(MODELS / name for name in parity.graphs)]
    return Results(
        params=load_params(),
        data=read_data_summary(),
        test=test,
        networks={variant: read_network(variant, test) for variant in VARIANTS},
        seeds=read_seeds(),
        layers=read_layers(CHECKPOINT),
        parity=parity,
        files=[ModelFile(p.as_posix(), p.stat().st_size, digest(p)) for p in files],
    )
