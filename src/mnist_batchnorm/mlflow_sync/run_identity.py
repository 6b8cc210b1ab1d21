"""What made a training run: the key that equal trainings share, and the tags that tell of it."""

import contextlib
import functools
import getpass
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_batchnorm.artifacts.metrics import TrainMetrics
from mnist_batchnorm.artifacts.network_results import trained_on
from mnist_batchnorm.artifacts.splits import SIDE
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, fingerprint, hashes
from mnist_batchnorm.core.params import Params, PrepareParams, TrainParams, load_params
from mnist_batchnorm.core.paths import (
    DVC_FILE,
    LOCK_FILE,
    MODELS,
    PARAMS_FILE,
    PREPARED,
    REPORTS,
    SEED_CURVES,
    SEEDS,
    SPLITS,
    repository,
)
from mnist_batchnorm.lineage.git import History, Made

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

BOTH = "both"  # in place of a variant
KEY_TAG = "mnist_bn.key"
WEIGHTS_TAG = "mnist_bn.weights_sha256"
EXPERIMENT_TAG = "dvc.exp_name"
USER_TAG = "mlflow.user"


@functools.lru_cache(maxsize=1)
def _parsed(lock: str) -> Any:
    """Parse a ``dvc.lock``, which takes a third of a second; three runs are made from the same."""
    return YAML(typ="safe", pure=True).load(lock)


class Inputs(NamedTuple):
    """What a stage that trains depends on.

    Attributes:
        deps: MD5 of each dependency of the stage by path, as ``dvc.lock`` shows them.
        prepare: how the data was split.
        train: how the networks were trained.
    """

    deps: Mapping[str, str]
    prepare: PrepareParams
    train: TrainParams

    @classmethod
    def of_workspace(cls, stage: str, params: Params | None = None) -> "Inputs":
        """Take them as they are in the current folder.

        Args:
            stage: as ``dvc.yaml`` calls it.
            params: other ones than those of ``params.yaml``.

        Raises:
            UserError: ``dvc.yaml``, ``params.yaml`` or a dependency is missing or unusable.
        """
        try:
            paths = YAML(typ="safe", pure=True).load(DVC_FILE)["stages"][stage]["deps"]
        except FileNotFoundError:
            raise UserError(f"no {DVC_FILE} in {Path.cwd()}") from None
        except (OSError, YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{DVC_FILE}: no deps of stage {stage} can be read: {error}") from None
        deps = {}
        for path in paths:
            try:
                deps[path] = digest(Path(path), "md5")
            except OSError as error:
                raise UserError(
                    f"{DVC_FILE}: stage {stage} depends on {path}, which cannot be read "
                    f"({error.strerror}); run `dvc repro {stage}`"
                ) from None
        params = params or load_params()
        return cls(deps, params.prepare, params.train)

    @classmethod
    def of_outs(cls, stage: str, outs: Sequence[Path]) -> "Inputs":
        """Find what the stage made its outputs on disk from.

        ``dvc.lock`` knows, even when code or params have been edited since. Where it is not about
        these very files, because the stage ran without DVC, they are taken from the workspace.

        Args:
            stage: as ``dvc.yaml`` calls it.
            outs: those that matter.

        Raises:
            UserError: What they would be taken from is missing or unusable.
        """
        try:
            stages = _parsed(LOCK_FILE.read_text(encoding="utf-8"))["stages"]
            made, prepare = stages[stage], stages["prepare"]
            md5 = {out["path"]: out["md5"] for out in made["outs"]}
            if all(md5[path.as_posix()] == digest(path, "md5") for path in outs):
                return cls(
                    {dep["path"]: dep["md5"] for dep in made["deps"]},
                    PrepareParams.model_validate(prepare["params"][str(PARAMS_FILE)]["prepare"]),
                    TrainParams.model_validate(made["params"][str(PARAMS_FILE)]["train"]),
                )
        except (FileNotFoundError, KeyError):  # DVC has not run these stages
            pass
        except (OSError, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{LOCK_FILE} cannot be used, run `dvc repro`: {error}") from None
        return cls.of_workspace(stage)


class Result(NamedTuple):
    """The file that a training left.

    Attributes:
        md5: as ``dvc.lock`` shows it.
        tags: that only a run of this very result has.
    """

    md5: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """What made a training run.

    Attributes:
        variant: ``bn`` or ``plain``.
        device: type of the device that it ran on, ``cpu`` or ``cuda``.
        deps: MD5 of each dependency of the stage by path, as ``dvc.lock`` shows them.
        prepare: how the data was split.
        train: how the network was trained.
        result: what came of it; None while it trains.
    """

    variant: str
    device: str
    deps: Mapping[str, str]
    prepare: PrepareParams
    train: TrainParams
    result: Result | None = field(default=None, kw_only=True)

    @classmethod
    def of_workspace(cls, variant: str, device: str, params: Params | None = None) -> "Origin":
        """Take the dependencies and params of stage train as they are in the current folder.

        Args:
            variant: ``bn`` or ``plain``.
            device: as PyTorch writes it; ``cuda:1`` counts as ``cuda``.
            params: other ones than those of ``params.yaml``.

        Raises:
            UserError: ``dvc.yaml``, ``params.yaml`` or a dependency is missing or unusable.
        """
        return cls(variant, device.partition(":")[0], *Inputs.of_workspace("train", params))

    @classmethod
    def of_files(cls, variant: str, metrics: TrainMetrics) -> "Origin":
        """Find what made the network on disk; see `Inputs.of_outs`.

        Args:
            variant: ``bn`` or ``plain``.
            metrics: what the stage wrote of its training.

        Raises:
            UserError: What the origin would be taken from is missing or unusable.
        """
        weights = MODELS / f"{variant}.safetensors"
        tags = {
            "mnist_bn.train_sha256": trained_on(weights),
            WEIGHTS_TAG: digest(weights),
            **({"mnist_bn.torch": metrics.torch} if metrics.torch else {}),
        }
        inputs = Inputs.of_outs("train", [REPORTS / f"curves/{variant}.csv", weights])
        return cls(variant, metrics.device, *inputs, result=Result(digest(weights, "md5"), tags))

    @property
    def stage(self) -> str:
        """The stage's address in DVC."""
        return "train"

    @property
    def key(self) -> str:
        """SHA-256 over data and params: equal keys mean that the same was trained."""
        return fingerprint(self.content())

    def content(self) -> dict[str, object]:
        """Return what the key is over: data and params, not code.

        Code that computes other numbers from them makes another result, and so another run; code
        that was only tidied does not.
        """
        train = self.train.model_dump(mode="json")
        data = {path: md5 for path, md5 in self.deps.items() if Path(path).parent == PREPARED}
        return {
            "stage": self.stage,
            "variant": self.variant,
            "data": data,
            "params": train | {"device": self.device},  # not auto, which may mean the same
        }

    @property
    def label(self) -> str:
        """What to call it among the runs of one experiment."""
        return self.variant

    def name(self, made: Made) -> str:
        """Return what the run is called in MLflow."""
        if made.experiments:
            return f"{made.experiments[0]}/{self.label}"
        at = made.commit[:7] if made.commit and made.recorded else "workspace"
        return f"{at}/{self.label}"

    @property
    def source(self) -> str:
        """The command that ran it."""
        return f"mnist-bn train {self.variant}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows and compares: ``train.lr`` -> ``0.01``."""
        flat = {
            f"{section}.{name}": str(value)
            for section, params in {"prepare": self.prepare, "train": self.train}.items()
            for name, value in params.model_dump(mode="json").items()
        }
        return {"variant": self.variant, "batch_norm": str(self.variant == "bn").lower(), **flat}

    def own_tags(self) -> dict[str, str]:
        """Return the tags that tell it from other runs of its stage."""
        result = self.result.tags if self.result else {}
        return {KEY_TAG: self.key, "mnist_bn.variant": self.variant, **result}

    def tags(self, made: Made) -> dict[str, str]:
        """Return what ties the run to its key, DVC and git; nothing that a repetition changes."""
        deps = made.deps or self.deps
        tags = {
            **self.own_tags(),
            "mnist_bn.device": self.device,
            "dvc.stage": self.stage,
            # as md5sum writes it
            "dvc.deps": "\n".join(f"{md5}  {path}" for path, md5 in sorted(deps.items())),
            "mlflow.source.name": self.source,
            "mlflow.source.type": "LOCAL",
        }
        if made.commit:
            tags["mlflow.source.git.commit"] = made.commit
            tags["mlflow.source.git.dirty"] = str(self.dirty(made)).lower()
        if made.experiments:
            tags[EXPERIMENT_TAG] = ", ".join(made.experiments)
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            tags[USER_TAG] = getpass.getuser()
        return tags

    def dirty(self, made: Made) -> bool:
        """Tell whether the commit's files would give another result."""
        if made.recorded:
            return False
        return History(repository()).differs([*self.deps, str(DVC_FILE), str(PARAMS_FILE)])

    def made(self, history: History) -> Made:
        """Find where the result is on record, the experiment that runs now included."""
        made = Made(history.head)
        if self.result:
            made = history.made(self.stage, self.result.md5)
        if running := os.environ.get("DVC_EXP_NAME"):
            made = made._replace(experiments=tuple(sorted({*made.experiments, running})))
        if not made.recorded and (base := os.environ.get("DVC_EXP_BASELINE_REV")):
            made = made._replace(commit=base)
        return made

    def datasets(self) -> "list[DatasetInput]":
        """Return the two splits as MLflow's dataset inputs, their digests those of DVC."""
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
class SeedsOrigin(Origin):
    """What made the runs of stage seeds: all of them, or one.

    Attributes:
        outs: MD5 of what the stage wrote. Known when the runs are recorded, so in their keys:
            other numbers from the same inputs are other runs.
        count: how many seeds.
        seed: of one run; None for all.
    """

    outs: Mapping[str, str]
    count: int
    seed: int | None = None

    @classmethod
    def of_summary(cls, device: str, count: int) -> "SeedsOrigin":
        """Find what made the files on disk; see `Inputs.of_outs`.

        Args:
            device: as the stage's metrics name it.
            count: how many seeds they are about.

        Raises:
            UserError: What the origin would be taken from is missing or unusable.
        """
        outs = [SEEDS, SEED_CURVES]
        inputs, md5 = Inputs.of_outs("seeds", outs), hashes(outs, "md5")
        result = Result(md5[SEEDS.as_posix()], {})
        return cls(BOTH, device, *inputs, md5, count, result=result)

    def one(self, variant: str, seed: int) -> "SeedsOrigin":
        """Return what made one of the runs."""
        train = self.train.model_copy(update={"seed": seed})
        return replace(self, variant=variant, seed=seed, train=train)

    @property
    def stage(self) -> str:
        """The stage's address in DVC."""
        return "seeds"

    def content(self) -> dict[str, object]:
        """Return what the key is over."""
        content = super().content() | {"outs": dict(self.outs)}
        if self.seed is None:
            content["params"] = self.train.model_dump(mode="json", exclude={"device", "seed"})
        return content

    @property
    def label(self) -> str:
        """What to call it among the runs of one experiment."""
        return "seeds" if self.seed is None else f"seeds/{self.variant}-{self.seed}"

    @property
    def source(self) -> str:
        """The command that ran it."""
        return f"mnist-bn train --seeds {self.count}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows; those of all have no seed and no network."""
        params = super().logged_params()
        if self.seed is not None:
            return params
        shown = {name: params[name] for name in params if "." in name and name != "train.seed"}
        return {"seeds.count": str(self.count), **shown}

    def datasets(self) -> "list[DatasetInput]":
        """Return the splits, once for all runs."""
        return super().datasets() if self.seed is None else []
