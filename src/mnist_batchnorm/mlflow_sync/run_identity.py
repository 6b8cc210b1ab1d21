"""The identity of a training run: its key, its parameters and tags, and where it is recorded."""

import contextlib
import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mnist_batchnorm.artifacts.checkpoints import read_train_sha256
from mnist_batchnorm.artifacts.curves import CURVES
from mnist_batchnorm.artifacts.metrics import TrainMetrics
from mnist_batchnorm.artifacts.splits import SIDE
from mnist_batchnorm.core.files import digest, fingerprint, hashes
from mnist_batchnorm.core.params import Params, PrepareParams, TrainParams
from mnist_batchnorm.core.paths import (
    CHECKPOINTS,
    DVC_FILE,
    PARAMS_FILE,
    PREPARED,
    SEED_CURVES,
    SEEDS,
    SPLITS,
    repository,
)
from mnist_batchnorm.lineage.git import GitHistory, Provenance
from mnist_batchnorm.mlflow_sync.stage_inputs import StageInputs

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

BOTH = "both"  # in place of a variant
KEY_TAG = "mnist_bn.key"
WEIGHTS_TAG = "mnist_bn.weights_sha256"
EXPERIMENT_TAG = "dvc.exp_name"
USER_TAG = "mlflow.user"


class Result(NamedTuple):
    """The main file that a training wrote."""

    md5: str
    tags: Mapping[str, str]  # that only a run with this result has


@dataclass(frozen=True)
class RunIdentity:
    """What a training run was made from, and its result."""

    stage: ClassVar[str] = "train"

    variant: str
    device: str  # cpu or cuda
    deps: Mapping[str, str]  # path -> MD5, as in dvc.lock
    prepare: PrepareParams
    train: TrainParams
    result: Result | None = field(default=None, kw_only=True)  # None while it trains

    @classmethod
    def of_workspace(cls, variant: str, device: str, params: Params | None = None) -> "RunIdentity":
        """Identify a training that starts now in the current folder.

        Raises:
            UserError: ``dvc.yaml``, ``params.yaml`` or a dependency is missing or unusable.
        """
        return cls(variant, device.partition(":")[0], *StageInputs.of_workspace("train", params))

    @classmethod
    def of_files(cls, variant: str, metrics: TrainMetrics) -> "RunIdentity":
        """Identify the training of the network on disk; see `StageInputs.of_outputs`."""
        weights = CHECKPOINTS[variant]
        tags = {
            "mnist_bn.train_sha256": read_train_sha256(weights),
            WEIGHTS_TAG: digest(weights),
            **({"mnist_bn.torch": metrics.torch} if metrics.torch else {}),
        }
        inputs = StageInputs.of_outputs("train", [CURVES[variant], weights])
        return cls(variant, metrics.device, *inputs, result=Result(digest(weights, "md5"), tags))

    @property
    def key(self) -> str:
        """SHA-256 of data and parameters: runs with equal keys trained the same."""
        return fingerprint(self.key_content())

    def key_content(self) -> dict[str, object]:
        """Return what the key is computed from: data and parameters, not code.

        Code that computes other numbers from them makes another result, and so another run; code
        that was only tidied does not.
        """
        return {
            "stage": self.stage,
            "variant": self.variant,
            "data": {p: md5 for p, md5 in self.deps.items() if Path(p).parent == PREPARED},
            # not the device auto, which may mean the same
            "params": self.train.model_dump(mode="json") | {"device": self.device},
        }

    @property
    def label(self) -> str:
        return self.variant

    def run_name(self, provenance: Provenance) -> str:
        if provenance.experiments:
            return f"{provenance.experiments[0]}/{self.label}"
        commit = provenance.commit if provenance.recorded else None
        return f"{commit[:7] if commit else 'workspace'}/{self.label}"

    @property
    def command(self) -> str:
        return f"mnist-bn train {self.variant}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows and compares: ``train.lr`` -> ``0.01``."""
        flat = {
            f"{section}.{name}": str(value)
            for section, params in {"prepare": self.prepare, "train": self.train}.items()
            for name, value in params.model_dump(mode="json").items()
        }
        return {"variant": self.variant, "batch_norm": str(self.variant == "bn").lower(), **flat}

    def identifying_tags(self) -> dict[str, str]:
        """Return the tags that distinguish the run from others of its stage."""
        tags = {KEY_TAG: self.key, "mnist_bn.variant": self.variant}
        return {**tags, **self.result.tags} if self.result else tags

    def tags(self, provenance: Provenance) -> dict[str, str]:
        """Return the tags with key, DVC and git; the same when the training is repeated."""
        deps = provenance.deps or self.deps
        tags = {
            **self.identifying_tags(),
            "mnist_bn.device": self.device,
            "dvc.stage": self.stage,
            # in md5sum's format
            "dvc.deps": "\n".join(f"{md5}  {path}" for path, md5 in sorted(deps.items())),
            "mlflow.source.name": self.command,
            "mlflow.source.type": "LOCAL",
        }
        if provenance.commit:
            tags["mlflow.source.git.commit"] = provenance.commit
            paths = [*self.deps, str(DVC_FILE), str(PARAMS_FILE)]
            dirty = not provenance.recorded and GitHistory(repository()).is_dirty(paths)
            tags["mlflow.source.git.dirty"] = str(dirty).lower()
        if provenance.experiments:
            tags[EXPERIMENT_TAG] = ", ".join(provenance.experiments)
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            tags[USER_TAG] = getpass.getuser()
        return tags

    def provenance(self, history: GitHistory) -> Provenance:
        """Find where the result is recorded, including the DVC experiment that runs now."""
        found = Provenance(history.head)
        if self.result:
            found = history.provenance(self.stage, self.result.md5)
        if running := os.environ.get("DVC_EXP_NAME"):
            found = found._replace(experiments=tuple(sorted({*found.experiments, running})))
        if not found.recorded and (base := os.environ.get("DVC_EXP_BASELINE_REV")):
            found = found._replace(commit=base)
        return found

    def datasets(self) -> "list[DatasetInput]":
        """Return train and valid split as MLflow's dataset inputs with DVC's MD5s as digests."""
        import numpy as np
        from mlflow.data.schema import TensorDatasetSchema
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.types import Schema, TensorSpec

        uint8 = np.dtype(np.uint8)
        schema = TensorDatasetSchema(
            features=Schema([TensorSpec(uint8, (-1, SIDE, SIDE), "images")]),
            targets=Schema([TensorSpec(uint8, (-1,), "labels")]),
        )
        contexts = {"train": "training", "valid": "validation"}
        return [
            DatasetInput(
                Dataset(
                    name=split,
                    digest=self.deps[path],
                    source_type="local",
                    source=json.dumps({"uri": path}),
                    schema=json.dumps(schema.to_dict()),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for split, context in contexts.items()
            if (path := SPLITS[split].as_posix()) in self.deps
        ]


@dataclass(frozen=True)
class SeedsIdentity(RunIdentity):
    """What the runs of stage seeds were made from: all of them, or one.

    Attributes:
        outs: MD5 of the stage's outputs, part of the keys: other numbers from the same inputs are
            other runs.
        count: number of seeds.
        seed: seed of one run; None for the parent run of all.
    """

    stage: ClassVar[str] = "seeds"

    outs: Mapping[str, str]
    count: int
    seed: int | None = None

    @classmethod
    def of_summary(cls, device: str, count: int) -> "SeedsIdentity":
        """Identify the runs behind the files on disk; see `StageInputs.of_outputs`."""
        outs = [SEEDS, SEED_CURVES]
        inputs, md5 = StageInputs.of_outputs("seeds", outs), hashes(outs, "md5")
        return cls(BOTH, device, *inputs, md5, count, result=Result(md5[SEEDS.as_posix()], {}))

    def of_seed(self, variant: str, seed: int) -> "SeedsIdentity":
        train = self.train.model_copy(update={"seed": seed})
        return replace(self, variant=variant, seed=seed, train=train)

    def key_content(self) -> dict[str, object]:
        content = super().key_content() | {"outs": dict(self.outs)}
        if self.seed is None:
            content["params"] = self.train.model_dump(mode="json", exclude={"device", "seed"})
        return content

    @property
    def label(self) -> str:
        return "seeds" if self.seed is None else f"seeds/{self.variant}-{self.seed}"

    @property
    def command(self) -> str:
        return f"mnist-bn train --seeds {self.count}"

    def logged_params(self) -> dict[str, str]:
        params = super().logged_params()
        if self.seed is not None:
            return params
        shared = {name: params[name] for name in params if "." in name and name != "train.seed"}
        return {"seeds.count": str(self.count), **shared}

    def datasets(self) -> "list[DatasetInput]":
        return super().datasets() if self.seed is None else []
