"""MLflow's model registry as a view of ``models/registry.json``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_batchnorm.artefacts import SHA256_TAG, log_onnx
from mnist_batchnorm.files import digest
from mnist_batchnorm.layout import MODELS, REGISTERED
from mnist_batchnorm.ledger import (
    Hashes,
    Ledger,
    PromotedByOverride,
    PromotedByRules,
    RolledBack,
    Version,
)
from mnist_batchnorm.store import Runs

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mnist_batchnorm.artefacts import Example

VERSION_TAG = "mnist_bn.version"  # in the ledger; on a store of one's own MLflow counts the same
VERSIONS_PER_REQUEST = 1000
ALIASES = ("champion", "candidate")


def find_file(runs: Runs, name: str, version: Version) -> Path | None:
    """Find the bytes of a registered file: in ``models/``, or in DVC's cache; None if nowhere."""
    path, file = MODELS / REGISTERED[name], version.files[name]
    if path.is_file() and digest(path) == file.sha256:
        return path
    return runs.history.cached(file.md5)


def candidate(ledger: Ledger) -> Version | None:
    """Return the version of the files in ``models/``, else the newest."""
    paths = {name: MODELS / file for name, file in REGISTERED.items()}
    present: Version | None = None
    if all(path.is_file() for path in paths.values()):
        files = {n: Hashes(sha256=digest(p), md5=digest(p, "md5")) for n, p in paths.items()}
        present = ledger.find(files)
    return present or (ledger.versions[-1] if ledger.versions else None)


def complete_registry(runs: Runs, ledger: Ledger, example: "Example") -> dict[str, dict[str, str]]:
    """Make MLflow show every version of the ledger that has a file, and the aliases.

    Args:
        runs: where.
        ledger: the truth.
        example: gives float32 ``[n, 784]``, shown as the models' input example.

    Returns:
        The version of each alias of each model, as MLflow counts them.
    """
    aliases = {}
    for name in REGISTERED:
        shown = _complete_versions(runs, name, ledger, example)
        wanted = {"champion": ledger.champion, "candidate": candidate(ledger)}
        aliases[name] = {
            alias: shown[version.version]
            for alias, version in wanted.items()
            if version and version.version in shown
        }
        _complete_aliases(runs, name, aliases[name])
    return aliases


def _complete_versions(runs: Runs, name: str, ledger: Ledger, example: "Example") -> dict[int, str]:
    """Return MLflow's number of each version of the ledger that it shows."""
    from mlflow.exceptions import MlflowException

    if not ledger.versions:
        return {}
    try:
        runs.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    numbers = {}
    for version in ledger.versions:
        sha256 = version.files[name].sha256
        shown = _find_version(runs, name, version)
        if shown is None and (path := find_file(runs, name, version)):
            run_id = runs.of_weights(version.weights_sha256)
            model_id = log_onnx(runs, path, Path(REGISTERED[name]).stem, example, run_id)
            made = runs.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=run_id,
                tags={SHA256_TAG: sha256, VERSION_TAG: str(version.version)},
                model_id=model_id,
            )
            shown = _find_version(runs, name, version)  # another machine's, if that was faster
            if shown and shown.version != made.version:
                runs.client.delete_model_version(name, made.version)
        if shown:
            numbers[version.version] = str(shown.version)
            _complete_decision(runs, shown, version, ledger)
    return numbers


def _find_version(runs: Runs, name: str, version: Version) -> "ModelVersion | None":
    query = f"name = '{name}' AND tags.`{VERSION_TAG}` = '{version.version}'"
    found = runs.client.search_model_versions(query, max_results=VERSIONS_PER_REQUEST)
    same = [one for one in found if one.tags[SHA256_TAG] == version.files[name].sha256]
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
    head = f"{version.decision.outcome} by the rules of stage register:"
    return "\n".join([head, "", *lines, *(["", *events] if events else [])])


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


def _complete_aliases(runs: Runs, name: str, wanted: dict[str, str]) -> None:
    there: dict[str, Any] = {}
    for model in runs.client.search_registered_models(f"name = '{name}'"):
        there = dict(model.aliases)
    for alias in ALIASES:
        if alias in wanted and str(there.get(alias)) != wanted[alias]:
            runs.client.set_registered_model_alias(name, alias, wanted[alias])
        elif alias in there and alias not in wanted:
            runs.client.delete_registered_model_alias(name, alias)
