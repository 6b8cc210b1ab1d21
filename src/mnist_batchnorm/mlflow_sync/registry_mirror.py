"""MLflow's model registry as a view of ``models/registry.json``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mnist_batchnorm.artifacts.registry_file import (
    Event,
    Hashes,
    Ledger,
    PromotedByRules,
    RolledBack,
    Version,
)
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, REGISTRY
from mnist_batchnorm.mlflow_sync.artifacts import SHA256_TAG, log_onnx
from mnist_batchnorm.mlflow_sync.run_store import RunStore

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

VERSION_TAG = "mnist_bn.version"  # number in the ledger
VERSIONS_PER_REQUEST = 1000
ALIASES = ("champion", "candidate")
MARK_TAG = "mnist_bn.ledger"  # number of the ledger's marks that MLflow shows, and the last one
MAX_DESCRIPTION = 5000  # characters of MLflow's column; only PostgreSQL enforces it


def find_file(store: RunStore, name: str, version: Version) -> Path | None:
    """Return the path of a registered file in ``models/`` or DVC's cache; None if in neither."""
    file = version.files[name]
    path = MODELS / REGISTERED[name]
    if path.is_file() and digest(path) == file.sha256:
        return path
    cached = store.history.cached(file.md5)  # imports DVC
    return cached if cached and digest(cached) == file.sha256 else None


def find_candidate(ledger: Ledger) -> Version | None:
    """Return the version of the files in ``models/``, else the newest version."""
    paths = {name: MODELS / file for name, file in REGISTERED.items()}
    if all(path.is_file() for path in paths.values()):
        files = {n: Hashes(sha256=digest(p), md5=digest(p, "md5")) for n, p in paths.items()}
        if present := ledger.find(files):
            return present
    return ledger.versions[-1] if ledger.versions else None


def update_registry(
    store: RunStore, ledger: Ledger, *, by_hand: bool = False
) -> dict[str, dict[str, str]]:
    """Create or update the versions whose files are available, and the aliases; idempotent.

    If MLflow shows the champion of another history than this ledger's, as in an old checkout of a
    project whose champion has changed since, the aliases stay as they are.
    """
    aliases: dict[str, dict[str, str]] = {}
    for name in REGISTERED:
        if ledger.versions:
            _create_model(store, name)
        elif not store.client.search_registered_models(f"name = '{name}'"):
            aliases[name] = {}
            continue
        shown = _update_versions(store, name, ledger)
        if by_hand or _continues(store, name, ledger):
            wanted = {"champion": ledger.champion, "candidate": find_candidate(ledger)}
            numbers = {
                alias: str(shown[version.version].version)
                for alias, version in wanted.items()
                if version and version.version in shown
            }
            _update_aliases(store, name, numbers)
            marks = ledger.history_hashes()
            mark = f"{len(marks)} {marks[-1]}" if marks else "0"
            store.client.set_registered_model_tag(name, MARK_TAG, mark)
        else:
            click.echo(
                f"{name}: MLflow shows the champion of another history than {REGISTRY} holds, and "
                "keeps it; take that ledger from git, or move the champion with `mnist-bn promote` "
                "or `mnist-bn rollback`",
                err=True,
            )
        aliases[name] = _aliases(store, name)
        for version in ledger.versions:  # last, because no program reads them
            if version.version in shown:
                _update_decision(store, shown[version.version], version, ledger)
    return aliases


def _create_model(store: RunStore, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _continues(store: RunStore, name: str, ledger: Ledger) -> bool:
    """Whether the ledger starts with the history whose champion MLflow shows."""
    shown = store.client.get_registered_model(name).tags.get(MARK_TAG, "0")
    count, _, mark = shown.partition(" ")
    marks = ledger.history_hashes()
    return not mark or (int(count) <= len(marks) and marks[int(count) - 1] == mark)


def _update_versions(store: RunStore, name: str, ledger: Ledger) -> "dict[int, ModelVersion]":
    """Return MLflow's version for each of the ledger's by number.

    A version that cannot be loaded, because its model or run was deleted, is replaced.
    """
    found = {}
    for version in ledger.versions:
        shown = _find_version(store, name, version)
        path = find_file(store, name, version)
        if path:
            run_id = store.find_by_weights(version.weights_sha256)
            source = log_onnx(store, path, Path(REGISTERED[name]).stem, run_id)
            # a version registered before its run was known keeps its number, without the run
            if shown and (
                shown.source != f"models:/{source}" or shown.run_id not in ("", None, run_id)
            ):
                store.client.delete_model_version(name, shown.version)
                shown = None
            shown = shown or _create_version(store, name, version, source, run_id)
        if shown:
            found[version.version] = shown
    return found


def _create_version(
    store: RunStore, name: str, version: Version, model_id: str, run_id: str | None
) -> "ModelVersion":
    import mlflow

    mlflow.set_tracking_uri(store.uri)  # where the client resolves models:/
    tags = {SHA256_TAG: version.files[name].sha256, VERSION_TAG: str(version.version)}
    created = store.client.create_model_version(
        name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id
    )
    shown = _find_version(store, name, version) or created
    if shown.version != created.version:  # another machine was faster
        store.client.delete_model_version(name, created.version)
    return shown


def _find_version(store: RunStore, name: str, version: Version) -> "ModelVersion | None":
    query = f"name = '{name}' AND tags.`{VERSION_TAG}` = '{version.version}'"
    found = store.client.search_model_versions(query, max_results=VERSIONS_PER_REQUEST)
    sha256 = version.files[name].sha256
    same = [match for match in found if match.tags.get(SHA256_TAG) == sha256]
    return min(same, key=lambda match: int(match.version), default=None)


def _update_decision(
    store: RunStore, shown: "ModelVersion", version: Version, ledger: Ledger
) -> None:
    decision, description = version.decision, decision_text(version, ledger)
    tags: dict[str, str] = {"decision": decision.outcome}
    for name, rule in decision.rules.items():
        tags[f"rule.{name}"] = f"{'passed' if rule.passed else 'refused'}: {rule.says}"
    for key, value in tags.items():
        if shown.tags.get(key) != value:
            store.client.set_model_version_tag(shown.name, shown.version, key, value)
    if shown.description != description:
        store.client.update_model_version(shown.name, shown.version, description)


def decision_text(version: Version, ledger: Ledger) -> str:
    number, decision = version.version, version.decision
    lines = [f"Version {number} of {REGISTRY}, {decision.outcome} by the rules:", ""]
    for name, rule in decision.rules.items():
        lines.append(f"- {name}: {'' if rule.passed else '**refused** '}{rule.says}")
    if events := [event for event in ledger.events if event.version == number]:
        lines += ["", *(f"- {describe_event(event)}" for event in events)]
    text = "\n".join(lines)
    return text if len(text) <= MAX_DESCRIPTION else f"{text[: MAX_DESCRIPTION - 1]}…"


def describe_event(event: Event) -> str:
    if isinstance(event, PromotedByRules):
        return "promoted by the rules"
    what = f"rolled back to version {event.to}" if isinstance(event, RolledBack) else "promoted"
    why = f": {event.why}" if event.why else ""
    return f"{what} by {event.who} at {event.when}{why}"


def _aliases(store: RunStore, name: str) -> dict[str, str]:
    existing = store.client.get_registered_model(name).aliases
    return {alias: str(existing[alias]) for alias in ALIASES if alias in existing}


def _update_aliases(store: RunStore, name: str, wanted: dict[str, str]) -> None:
    existing = _aliases(store, name)
    for alias in ALIASES:
        if alias in wanted and existing.get(alias) != wanted[alias]:
            store.client.set_registered_model_alias(name, alias, wanted[alias])
        elif alias in existing and alias not in wanted:
            store.client.delete_registered_model_alias(name, alias)
