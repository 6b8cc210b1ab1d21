"""Whether MLflow already matches the files, found in a fraction of a second without MLflow.

A note beside the database describes what the last sync left in the store. It counts only while the
store still has those runs, models and aliases.
"""

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from mnist_batchnorm.core.files import digest, fingerprint, hashes, write_json
from mnist_batchnorm.core.paths import LOCK_FILE, MODELS, PARAMS_FILE, REPORTS, SYNCED
from mnist_batchnorm.lineage.git import GitHistory
from mnist_batchnorm.mlflow_sync.uri import database_path, is_server, tracking_uri

SERVER_TIMEOUT_S = 2.0
STAGE = "sync"
NOTE = "mlflow.db.synced"
# the packages that decide what MLflow should contain
CODE = [Path(__file__).parents[1] / package for package in ("artifacts", "lineage", "mlflow_sync")]


@dataclass(frozen=True)
class SyncedState:
    """What a sync left in a store."""

    state: str  # from `source_state`
    runs: Sequence[str]
    seeds: Sequence[str]  # runs nested in those
    models: Sequence[str]
    aliases: Mapping[str, Mapping[str, str]]  # version by model and alias
    folders: Sequence[str]  # local ones, with the artifacts of the runs and models
    lacking: Sequence[str]  # paths in DVC's cache whose results were left out


def synced_files() -> dict[str, str]:
    """Return the SHA-256 of the files in the current folder that MLflow is to match, by path."""
    files = (path for top in (REPORTS, MODELS) for path in sorted(top.rglob("*")))
    return hashes([p for p in files if p.is_file() and p != SYNCED and not p.name.startswith(".")])


def source_state(root: Path, everything: bool, files: Mapping[str, str]) -> str:
    """Return a fingerprint of everything that decides what MLflow should contain."""
    code = sorted(path for package in CODE for path in package.rglob("*.py"))
    return fingerprint(
        {
            "files": {**files, **hashes([path for path in [PARAMS_FILE] if path.is_file()])},
            "lock": _lock_without_sync(),
            "code": [digest(path) for path in code],
            "refs": GitHistory(root).refs(),
            "experiment": os.environ.get("DVC_EXP_NAME", ""),
            "everything": everything,
        }
    )


def _lock_without_sync() -> str:
    """Return ``dvc.lock`` without this stage's entry, which DVC writes after it."""
    text = LOCK_FILE.read_text(encoding="utf-8", errors="replace") if LOCK_FILE.is_file() else ""
    return re.sub(rf"^  {STAGE}:\n(   .*\n?)*", "", text, flags=re.MULTILINE)


def is_up_to_date(root: Path, everything: bool, state: str) -> bool:
    """Whether a sync from this state has been done, and the store still shows it."""
    synced = load_note(root, everything)
    return synced is not None and synced.state == state and still_shown(root, synced)


def load_note(root: Path, everything: bool) -> SyncedState | None:
    """Return what the last sync left in the present store; None if that is not known."""
    try:
        return SyncedState(**_notes(root)[_entry(root, everything)])
    except (KeyError, TypeError):
        return None


def save_note(root: Path, everything: bool, synced: SyncedState) -> None:
    """Note what a sync left in the present store."""
    write_json(root / NOTE, {**_notes(root), _entry(root, everything): asdict(synced)})


def _notes(root: Path) -> dict[str, Any]:
    try:
        notes = json.loads((root / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _entry(root: Path, everything: bool) -> str:
    # hashed, because the address may contain a password
    return fingerprint({"uri": tracking_uri(root), "everything": everything})


def still_shown(root: Path, synced: SyncedState) -> bool:
    """Whether the store still has all of it, and nothing that was left out is available now.

    False if the store does not answer quickly, or is neither a SQLite file nor a server.
    """
    lost = not all(Path(path).is_dir() for path in synced.folders)
    if lost or any(Path(path).exists() for path in synced.lacking):
        return False
    uri = tracking_uri(root)
    try:
        if path := database_path(root):
            return _database_has(path, synced)
        if is_server(uri):
            return _server_has(uri.rstrip("/"), synced)
    except (OSError, sqlite3.Error, ValueError, KeyError, TypeError):
        pass
    return False


def _database_has(path: Path, synced: SyncedState) -> bool:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:

        def select(query: str) -> set[tuple[Any, ...]]:
            return set(connection.execute(query))

        runs = select(
            "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active' AND status = 'FINISHED'"
        )
        models = select("SELECT model_id FROM logged_models WHERE lifecycle_stage = 'active'")
        aliases = select("SELECT name, alias, version FROM registered_model_aliases")
    wanted = {
        (name, alias, int(version))
        for name, versions in synced.aliases.items()
        for alias, version in versions.items()
    }
    return (
        {(run,) for run in (*synced.runs, *synced.seeds)} <= runs
        and {(model,) for model in synced.models} <= models
        and wanted == {alias for alias in aliases if alias[0] in synced.aliases}
    )


def _server_has(uri: str, synced: SyncedState) -> bool:
    import requests

    with requests.Session() as session:
        if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            session.headers["Authorization"] = f"Bearer {token}"

        def get(path: str, **query: str) -> Any:
            url = f"{uri}/api/2.0/mlflow/{path}"
            response = session.get(url, params=query, timeout=SERVER_TIMEOUT_S)
            if response.status_code == HTTPStatus.NOT_FOUND:
                return {}
            response.raise_for_status()
            return response.json()

        for run_id in [*synced.runs, *synced.seeds]:
            run = get("runs/get", run_id=run_id)["run"]["info"]
            if (run["lifecycle_stage"], run["status"]) != ("active", "FINISHED"):
                return False
        for model_id in synced.models:
            if not get(f"logged-models/{model_id}"):
                return False
        for name, wanted in synced.aliases.items():
            # a model without versions need not exist
            model = get("registered-models/get", name=name).get("registered_model", {})
            if {a["alias"]: a["version"] for a in model.get("aliases", ())} != wanted:
                return False
    return True
