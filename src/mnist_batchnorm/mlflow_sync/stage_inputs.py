"""What a training stage depends on, from ``dvc.lock`` or from the workspace."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params, PrepareParams, TrainParams, load_params
from mnist_batchnorm.core.paths import DVC_FILE, LOCK_FILE, PARAMS_FILE
from mnist_batchnorm.lineage.dvc_lock import load_stages


class StageInputs(NamedTuple):
    """What a training stage depends on."""

    deps: Mapping[str, str]  # path -> MD5, as in dvc.lock
    prepare: PrepareParams
    train: TrainParams

    @classmethod
    def of_workspace(cls, stage: str, params: Params | None = None) -> "StageInputs":
        """Read the inputs in the current folder.

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
    def of_outputs(cls, stage: str, outs: Sequence[Path]) -> "StageInputs":
        """Find the inputs of the outputs on disk.

        ``dvc.lock`` records them even if code or parameters have been edited since. If it is about
        other files, because the stage ran without DVC, the workspace counts.

        Raises:
            UserError: The source of the inputs is missing or unusable.
        """
        try:
            stages = load_stages(LOCK_FILE.read_text(encoding="utf-8"))
            recorded, prepare = stages[stage], stages["prepare"]
            md5 = {out["path"]: out["md5"] for out in recorded["outs"]}
            if all(md5[path.as_posix()] == digest(path, "md5") for path in outs):
                return cls(
                    {dep["path"]: dep["md5"] for dep in recorded["deps"]},
                    PrepareParams.model_validate(prepare["params"][str(PARAMS_FILE)]["prepare"]),
                    TrainParams.model_validate(recorded["params"][str(PARAMS_FILE)]["train"]),
                )
        except (FileNotFoundError, KeyError):  # DVC has not run these stages
            pass
        except (OSError, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{LOCK_FILE} cannot be used, run `dvc repro`: {error}") from None
        return cls.of_workspace(stage)
