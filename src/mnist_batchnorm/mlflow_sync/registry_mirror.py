"""MLflow's model registry as a view of ``models/registry.json``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mnist_batchnorm.artifacts.registry_file import (
    Hashes,
    Ledger,
    PromotedByOverride,
    PromotedByRules,
    RolledBack,
    Version,
)
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, REGISTRY
from mnist_batchnorm.mlflow_sync.artifacts import SHA256_TAG, log_onnx
from mnist_batchnorm.mlflow_sync.run_store import Runs

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mnist_batchnorm.mlflow_sync.artifacts import Example

VERSION_TAG = "mnist_bn.version"  # in the ledger; on a store of one's own MLflow counts the same
VERSIONS_PER_REQUEST = 1000
ALIASES = ("champion", "candidate")
MARK_TAG = "mnist_bn.ledger"  # of the model: how many events, and the last mark, it shows
DESCRIPTION = 5000  # characters that MLflow's column holds; only PostgreSQL minds more


def find_file(runs: Runs, name: str, version: Version) -> Path | None:
    """Find the bytes of a registered file: in ``models/``, or in DVC's cache; None if nowhere."""
    file = version.files[name]
    path = MODELS / REGISTERED[name]
    if path.is_file() and digest(path) == file.sha256:
        return path
    cached = runs.history.cached(file.md5)  # imports DVC
    return cached if cached and digest(cached) == file.sha256 else None


def candidate(ledger: Ledger) -> Version | None:
    """Return the version of the files in ``models/``, else the newest."""
    paths = {name: MODELS / file for name, file in REGISTERED.items()}
    present: Version | None = None
    if all(path.is_file() for path in paths.values()):
        files = {n: Hashes(sha256=digest(p), md5=digest(p, "md5")) for n, p in paths.items()}
        present = ledger.find(files)
    return present or (ledger.versions[-1] if ledger.versions else None)


def complete_registry(
    runs: Runs, ledger: Ledger, example: "Example", *, by_hand: bool = False
) -> dict[str, dict[str, str]]:
    """Make MLflow show every version of the ledger that has a file, and the aliases.

    Where MLflow shows the champion of another history than this ledger's, as it does in an old
    checkout of a project whose champion has moved on, the aliases stay as they are.

    Args:
        runs: where.
        ledger: the truth.
        example: gives float32 ``[n, 784]``, shown as the models' input example.
        by_hand: whether a person moves the champion now, so that this ledger counts.

    Returns:
        The version of each alias of each model, as MLflow counts them.
    """
    aliases: dict[str, dict[str, str]] = {}
    for name in REGISTERED:
        if ledger.versions:
            _create_model(runs, name)
        elif not runs.client.search_registered_models(f"name = '{name}'"):
            aliases[name] = {}
            continue
        shown = _complete_versions(runs, name, ledger, example)
        if by_hand or _goes_on(runs, name, ledger):
            wanted = {"champion": ledger.champion, "candidate": candidate(ledger)}
            numbers = {
                alias: str(shown[version.version].version)
                for alias, version in wanted.items()
                if version and version.version in shown
            }
            _complete_aliases(runs, name, numbers)
            marks = ledger.marks()
            mark = f"{len(marks)} {marks[-1] if marks else ''}".strip()
            runs.client.set_registered_model_tag(name, MARK_TAG, mark)
        else:
            click.echo(
                f"{name}: MLflow shows the champion of another history than {REGISTRY} holds, and "
                "keeps it; take that ledger from git, or move the champion with `mnist-bn promote` "
                "or `mnist-bn rollback`",
                err=True,
            )
        aliases[name] = _aliases(runs, name)
        for version in ledger.versions:  # last: nothing waits for the words
            if version.version in shown:
                _complete_decision(runs, shown[version.version], version, ledger)
    return aliases


def _create_model(runs: Runs, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        runs.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _goes_on(runs: Runs, name: str, ledger: Ledger) -> bool:
    """Tell whether the ledger's history is, or continues, that whose champion MLflow shows."""
    shown = runs.client.get_registered_model(name).tags.get(MARK_TAG, "0")
    count, _, mark = shown.partition(" ")
    marks = ledger.marks()
    return not mark or (int(count) <= len(marks) and marks[int(count) - 1] == mark)


def _complete_versions(
    runs: Runs, name: str, ledger: Ledger, example: "Example"
) -> "dict[int, ModelVersion]":
    """Return what MLflow shows of each version of the ledger.

    One whose model or run is gone, so that it cannot be loaded, is replaced.
    """
    found = {}
    for version in ledger.versions:
        shown = _find_version(runs, name, version)
        path = find_file(runs, name, version)
        if path:
            run_id = runs.of_weights(version.weights_sha256)
            source = log_onnx(runs, path, Path(REGISTERED[name]).stem, example, run_id)
            # one that was registered before its run was known keeps its number, without the run
            if shown and (
                shown.source != f"models:/{source}" or shown.run_id not in ("", None, run_id)
            ):
                runs.client.delete_model_version(name, shown.version)
                shown = None
            shown = shown or _create_version(runs, name, version, source, run_id)
        if shown:
            found[version.version] = shown
    return found


def _create_version(
    runs: Runs, name: str, version: Version, model_id: str, run_id: str | None
) -> "ModelVersion":
    tags = {SHA256_TAG: version.files[name].sha256, VERSION_TAG: str(version.version)}
    made = runs.client.create_model_version(
        name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id
    )
    shown = _find_version(runs, name, version) or made
    if shown.version != made.version:  # another machine was faster
        runs.client.delete_model_version(name, made.version)
    return shown


def _find_version(runs: Runs, name: str, version: Version) -> "ModelVersion | None":
    query = f"name = '{name}' AND tags.`{VERSION_TAG}` = '{version.version}'"
    found = runs.client.search_model_versions(query, max_results=VERSIONS_PER_REQUEST)
    same = [one for one in found if one.tags.get(SHA256_TAG) == version.files[name].sha256]
    return min(same, key=lambda one: int(one.version), default=None)


def _complete_decision(runs: Runs, shown: "ModelVersion", version: Version, ledger: Ledger) -> None:
    tags, description = decision_tags(version), decision_text(version, ledger)
    for key, value in tags.items():
        if shown.tags.get(key) != value:
            runs.client.set_model_version_tag(shown.name, shown.version, key, value)
    if shown.description != description:
        runs.client.update_model_version(shown.name, shown.version, description)


def decision_tags(version: Version) -> dict[str, str]:
    """Return the decision about a version, rule by rule, as MLflow's tags."""
    decision = version.decision
    return {
        "decision": decision.outcome,
        **{
            f"rule.{name}": f"{'passed' if rule.passed else 'refused'}: {rule.says}"
            for name, rule in decision.rules.items()
        },
    }


def decision_text(version: Version, ledger: Ledger) -> str:
    """Return for people what the rules decided about a version, and what became of it."""
    lines = [
        f"- {name}: {'' if rule.passed else '**refused** '}{rule.says}"
        for name, rule in version.decision.rules.items()
    ]
    events = [f"- {told(event)}" for event in ledger.events if event.version == version.version]
    head = f"Version {version.version} of {REGISTRY}, {version.decision.outcome} by the rules:"
    text = "\n".join([head, "", *lines, *(["", *events] if events else [])])
    return text if len(text) <= DESCRIPTION else f"{text[: DESCRIPTION - 1]}…"


def told(event: PromotedByRules | PromotedByOverride | RolledBack) -> str:
    """Say for people what happened to a version."""
    match event:
        case PromotedByRules():
            return "promoted by the rules"
        case PromotedByOverride():
            return f"promoted by {event.who} at {event.when}: {event.why}"
        case RolledBack():
            why = f": {event.why}" if event.why else ""
            return f"rolled back to version {event.to} by {event.who} at {event.when}{why}"


def _aliases(runs: Runs, name: str) -> dict[str, str]:
    there = runs.client.get_registered_model(name).aliases
    return {alias: str(there[alias]) for alias in ALIASES if alias in there}


def _complete_aliases(runs: Runs, name: str, wanted: dict[str, str]) -> None:
    there = _aliases(runs, name)
    for alias in ALIASES:
        if alias in wanted and there.get(alias) != wanted[alias]:
            runs.client.set_registered_model_alias(name, alias, wanted[alias])
        elif alias in there and alias not in wanted:
            runs.client.delete_registered_model_alias(name, alias)
