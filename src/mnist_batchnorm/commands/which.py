"""Command which: find the run, parameters, data and commit that produced a model file."""

import json
from pathlib import Path
from typing import Any

import click

from mnist_batchnorm.commands.options import FILE
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
from mnist_batchnorm.lineage.dvc_lock import md5_by_path, parse_stages
from mnist_batchnorm.lineage.git import GitHistory


def find_source(history: GitHistory, md5: str) -> dict[str, Any] | None:
    """Find a file in the ``dvc.lock`` of the working tree, of commits and of experiments."""
    found = history.provenance("", md5)
    commit = found.commit if found.recorded else None
    if commit:
        stages = history.lock_stages(commit)
    else:
        text = LOCK_FILE.read_text(errors="replace") if LOCK_FILE.is_file() else ""
        stages = parse_stages(text)
    outs = {name: md5_by_path(stage, "outs") for name, stage in stages.items()}
    makers = [(name, path) for name in outs for path in outs[name] if outs[name][path] == md5]
    if not makers:
        return None
    maker, path = makers[0]
    params: dict[str, Any] = {}
    for name in ("prepare", "train", maker):
        params |= stages.get(name, {}).get("params", {}).get(str(PARAMS_FILE), {})
    return {
        "stage": maker,
        "path": path,
        "commit": commit,
        "subject": history.describe(commit) if commit else None,
        "experiments": found.experiments,
        "params": params,
        "data": {
            path: split_md5
            for stage in stages.values()
            for path, split_md5 in md5_by_path(stage, "deps").items()
            if PREPARED in Path(path).parents
        },
    }


def find_versions(sha256: str) -> list[dict[str, Any]]:
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


def read_weights_sha256(path: Path) -> str | None:
    """Return the SHA-256 of its checkpoint that an ONNX file records; None if it records none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError):
        return None
    return {entry.key: entry.value for entry in model.metadata_props}.get(WEIGHTS_KEY)


def find_run(weights_sha256: str) -> dict[str, Any] | None:
    from mnist_batchnorm.commands import runs
    from mnist_batchnorm.core.params import load_params
    from mnist_batchnorm.mlflow_sync.run_store import reading

    with reading(load_params().sync.experiment, repository()) as store:
        run_id = store.find_by_weights(weights_sha256)
        return runs.describe(store.client.get_run(run_id)) if run_id else None


@click.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, as_json: bool) -> None:
    """Show which run and commit produced a model or ONNX file, wherever it has been copied.

    Looks up its hash in every commit and DVC experiment, the registry, and MLflow. Exit status:
    0 found, 1 nothing here produced these bytes, 2 the file cannot be read.
    """
    if not DVC_FILE.is_file():
        raise UserError(
            f"no {DVC_FILE} in {Path.cwd()}; run this in the folder that holds dvc.yaml"
        )
    try:
        sha256, md5 = digest(file), digest(file, "md5")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    source = find_source(GitHistory(repository()), md5)
    versions = find_versions(sha256)
    # a copy may have any name
    kind = Path(source["path"]).suffix if source else ".onnx" if versions else file.suffix
    weights = sha256 if kind == ".safetensors" else None
    if kind == ".onnx":
        weights = read_weights_sha256(file)
    run = problem = None
    try:
        run = find_run(weights) if weights else None
    except UserError as error:
        problem = error
    found = {
        "sha256": sha256,
        "weights_sha256": weights,
        "run_id": run and run["run_id"],
        "run": run,
        "source": source,
        "registered": versions,
    }
    click.echo(json.dumps(found, indent=2) if as_json else describe(file, found))
    if problem:
        click.echo(f"warning: {problem}", err=True)
    if not (source or versions or (run and weights == sha256)):
        of_run = f" of MLflow run {run['run_id']}, {run['name']}" if run else ""
        has_claim = weights and weights != sha256
        claim = f"; it says it was made from the weights {weights}{of_run}" if has_claim else ""
        raise CheckFailedError(f"no commit, experiment or version here made {file}{claim}")


def describe(file: Path, found: dict[str, Any]) -> str:
    """Format what was found as text."""
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
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"  {section:<12} {listed}")
        lines += [f"  data         {md5}  {path}" for path, md5 in source["data"].items()]
    run = found["run"]
    lines.append(f"  MLflow run   {run['run_id'] + ', ' + run['name'] if run else 'none'}")
    for version in found["registered"]:
        champion = ", champion" if version["champion"] else ""
        lines.append(f"  registered   {version['model']} version {version['version']}{champion}")
    return "\n".join(lines)
