"""Tool which: the run, parameters, data and commit that made a model file, found by its hash."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import (
    DVC_FILE,
    LOCK_FILE,
    PARAMS_FILE,
    PREPARED,
    REGISTERED,
    REGISTRY,
    WEIGHTS_KEY,
    repository,
)
from mnist_batchnorm.lineage.git import History, md5_of, stages_of


@dataclass(frozen=True)
class Source:
    """What made a file.

    Attributes:
        stage: of the pipeline.
        path: where the stage put it.
        commit: the oldest commit that holds it; None if it is in none yet.
        subject: of that commit.
        experiments: the DVC experiments that hold it.
        params: by section.
        data: MD5 of each file of data by path.
    """

    stage: str
    path: str
    commit: str | None
    subject: str | None
    experiments: tuple[str, ...]
    params: dict[str, Any]
    data: dict[str, str]


def find_source(history: History, md5: str) -> Source | None:
    """Find a file in the ``dvc.lock`` of the workspace, of commits and of experiments."""
    made = history.made("", md5)
    if made.recorded and made.commit:
        stages = history.lock(made.commit)
    else:
        stages = stages_of(LOCK_FILE.read_text(errors="replace")) if LOCK_FILE.is_file() else {}
    for name, stage in stages.items():
        for path, of_out in md5_of(stage, "outs").items():
            if of_out != md5:
                continue
            deps = {
                dep: of_dep
                for of in stages.values()
                for dep, of_dep in md5_of(of, "deps").items()
                if dep.startswith(f"{PREPARED.as_posix()}/")
            }
            params = {
                section: values
                for of in ("prepare", "train", name)
                for section, values in stages.get(of, {}).get("params", {})
                .get(str(PARAMS_FILE), {}).items()
            }  # fmt: skip
            recorded = made.commit if made.recorded else None
            subject = history.describe(recorded) if recorded else None
            return Source(name, path, recorded, subject, made.experiments, params, deps)
    return None


def find_versions(sha256: str) -> list[dict[str, Any]]:
    """Find a file among the registered versions."""
    from mnist_batchnorm.artifacts.registry_file import Ledger

    ledger = Ledger.load(REGISTRY)
    return [
        {
            "model": name,
            "version": version.version,
            "champion": version == ledger.champion,
            "decision": version.decision.outcome,
        }
        for version in ledger.versions
        for name in REGISTERED
        if version.files[name].sha256 == sha256
    ]


def weights_of(path: Path) -> str | None:
    """Return the SHA-256 of the checkpoint that an ONNX file says it was made from."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError):
        return None
    return {entry.key: entry.value for entry in model.metadata_props}.get(WEIGHTS_KEY)


def find_run(weights_sha256: str) -> dict[str, Any] | None:
    """Return what `runs` says of the run that made a checkpoint; None if MLflow has none."""
    from mnist_batchnorm.commands import runs as tool
    from mnist_batchnorm.core.params import load_params
    from mnist_batchnorm.mlflow_sync.run_store import opened

    with opened(load_params().sync.experiment, repository()) as runs:
        run_id = runs.of_weights(weights_sha256)
        return tool.describe(runs.client.get_run(run_id)) if run_id else None


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(file: Path, as_json: bool) -> None:
    """Tell what made a model or ONNX file, wherever it has been copied.

    Looks for its hash in every commit and DVC experiment, the registry, and MLflow. Exit status:
    0 known, 1 nothing here made these bytes, 2 the file cannot be read.
    """
    if not DVC_FILE.is_file():
        raise UserError(
            f"no {DVC_FILE} in {Path.cwd()}; run this in the folder that holds dvc.yaml"
        )
    try:
        sha256, md5 = digest(file), digest(file, "md5")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    source = find_source(History(repository()), md5)
    versions = find_versions(sha256)
    # a copy may be called anything
    kind = Path(source.path).suffix if source else ".onnx" if versions else file.suffix
    weights = weights_of(file) if kind == ".onnx" else sha256 if kind == ".safetensors" else None
    try:
        run = find_run(weights) if weights else None
        trouble = None
    except UserError as error:
        run, trouble = None, str(error)
    found = {
        "sha256": sha256,
        "weights_sha256": weights,
        "run_id": run and run["run_id"],
        "run": run,
        "source": asdict(source) if source else None,
        "registered": versions,
    }
    click.echo(json.dumps(found, indent=2) if as_json else describe(file, found))
    if trouble:
        click.echo(f"warning: {trouble}", err=True)
    if not (source or versions or (run and weights == sha256)):
        of = f" of MLflow run {run['run_id']}, {run['name']}" if run else ""
        says = weights and weights != sha256
        claim = f"; it says it was made from the weights {weights}{of}" if says else ""
        raise CheckFailedError(f"no commit, experiment or version here made {file}{claim}")


def describe(file: Path, found: dict[str, Any]) -> str:
    """Return what was found, for people."""
    lines = [f"{file}", f"  sha256       {found['sha256']}"]
    if found["weights_sha256"] not in (None, found["sha256"]):
        lines.append(f"  weights      {found['weights_sha256']}")
    if source := found["source"]:
        commit = source["subject"] or "none yet: the results are not committed"
        lines += [
            f"  made by      stage {source['stage']}, as {source['path']}",
            f"  commit       {commit}",
            f"  experiments  {', '.join(source['experiments']) or 'none'}",
        ]
        for section, values in source["params"].items():
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"  {section:<12} {told}")
        lines += [f"  data         {md5}  {path}" for path, md5 in source["data"].items()]
    run = found["run"]
    lines.append(f"  MLflow run   {run['run_id'] + ', ' + run['name'] if run else 'none'}")
    for one in found["registered"]:
        champion = ", champion" if one["champion"] else ""
        lines.append(f"  registered   {one['model']} version {one['version']}{champion}")
    return "\n".join(lines)
