"""Whether MLflow already has all of it: looked up in a second, without importing MLflow.

Beside the database lies a note of what was brought there. It counts only while the store still
shows those runs, models and aliases.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from mnist_batchnorm.core.files import digest, fingerprint, hashes, write_json
from mnist_batchnorm.core.paths import LOCK_FILE, MODELS, PARAMS_FILE, REPORTS, SYNCED
from mnist_batchnorm.lineage.git import History
from mnist_batchnorm.mlflow_sync.uri import database, tracking_uri

TIMEOUT = 2.0  # seconds that a server has to say what it holds
STAGE = "sync"


@dataclass(frozen=True)
class Held:
    """What was brought to a store.

    Attributes:
        state: of the files, as `state_of` says it.
        runs: their ids.
        seeds: the ids of the runs within them.
        models: the ids of the logged models.
        aliases: version of each alias of each registered model.
        folders: where the files of these runs and models are, if that is on this machine.
        lacking: files that DVC's cache lacked; what they are of was left out.
    """

    state: str
    runs: Sequence[str]
    seeds: Sequence[str]
    models: Sequence[str]
    aliases: Mapping[str, Mapping[str, str]]
    folders: Sequence[str]
    lacking: Sequence[str]


def state_of(root: Path, everything: bool) -> str:
    """Return a hash of all that MLflow is told of, and of the code that tells.

    Args:
        root: the repository.
        everything: whether results of commits and experiments count as well.
    """
    code = sorted(Path(__file__).parent.glob("*.py"))
    return fingerprint(
        {
            "files": hashes([*told_of(), *(p for p in [PARAMS_FILE] if p.is_file())]),
            "lock": lock_of_others(),
            "code": [digest(path) for path in code],
            "refs": History(root).refs(),
            "experiment": os.environ.get("DVC_EXP_NAME", ""),
            "everything": everything,
        }
    )


def told_of() -> list[Path]:
    """Return the files in the current folder that MLflow is told of."""
    files = (path for top in (REPORTS, MODELS) for path in sorted(top.rglob("*")))
    return [p for p in files if p.is_file() and p != SYNCED and not p.name.startswith(".")]


def lock_of_others() -> list[str]:
    """Return the lines of ``dvc.lock`` but for those of this stage, which DVC adds after it."""
    try:
        lines = LOCK_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    kept, ours = [], False
    for line in lines:
        if line.startswith("  ") and not line.startswith("   "):
            ours = line == f"  {STAGE}:"
        if not ours:
            kept.append(line)
    return kept


def remembered(root: Path, everything: bool) -> Held | None:
    """Return what the note says was brought to the present store."""
    try:
        return Held(**json.loads(_note(root).read_text())[_entry(root, everything)])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(root: Path, everything: bool, held: Held) -> None:
    """Note what was brought to the present store."""
    try:
        notes = json.loads(_note(root).read_text())
    except (OSError, ValueError):
        notes = {}
    if not isinstance(notes, dict):
        notes = {}
    write_json(_note(root), {**notes, _entry(root, everything): asdict(held)})


def still_there(root: Path, held: Held) -> bool:
    """Tell whether the store shows what was brought to it; if it cannot be seen quickly, no.

    Nor if what was left out could be brought now.
    """
    lost = not all(Path(path).is_dir() for path in held.folders)
    if lost or any(Path(path).exists() for path in held.lacking):
        return False
    uri = tracking_uri(root)
    try:
        if local := database(root):
            return _in_database(local, held)
        if uri.startswith(("http:", "https:")):
            return _on_server(uri.rstrip("/"), held)
    except (OSError, sqlite3.Error, ValueError, KeyError, TypeError):
        pass
    return False


def _note(root: Path) -> Path:
    return root / "mlflow.db.synced"


def _entry(root: Path, everything: bool) -> str:
    # the address may hold a password
    return fingerprint({"uri": tracking_uri(root), "everything": everything})


def _in_database(path: Path, held: Held) -> bool:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:

        def select(query: str) -> list[tuple[Any, ...]]:
            return connection.execute(query).fetchall()

        runs = select(
            "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active' AND status = 'FINISHED'"
        )
        models = select("SELECT model_id FROM logged_models WHERE lifecycle_stage = 'active'")
        aliases = select("SELECT name, alias, version FROM registered_model_aliases")
    wanted = {(n, a, int(v)) for n, of in held.aliases.items() for a, v in of.items()}
    return (
        {*held.runs, *held.seeds} <= {run for (run,) in runs}
        and set(held.models) <= {model for (model,) in models}
        and wanted == {alias for alias in aliases if alias[0] in held.aliases}
    )


def _on_server(uri: str, held: Held) -> bool:
    import requests

    with requests.Session() as session:
        if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            session.headers["Authorization"] = f"Bearer {token}"

        def get(path: str, **query: str) -> Any:
            answer = session.get(f"{uri}/api/2.0/mlflow/{path}", params=query, timeout=TIMEOUT)
            if answer.status_code == HTTPStatus.NOT_FOUND:
                return {}
            answer.raise_for_status()
            return answer.json()

        for run_id in [*held.runs, *held.seeds]:
            run = get("runs/get", run_id=run_id)["run"]["info"]
            if (run["lifecycle_stage"], run["status"]) != ("active", "FINISHED"):
                return False
        for model_id in held.models:
            if not get(f"logged-models/{model_id}"):
                return False
        for name, wanted in held.aliases.items():
            # if nothing is registered there need be no model of that name
            model = get("registered-models/get", name=name).get("registered_model", {})
            if {a["alias"]: a["version"] for a in model.get("aliases", ())} != wanted:
                return False
    return True
