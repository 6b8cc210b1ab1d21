"""Where MLflow stores."""

import os
import re
from pathlib import Path


def tracking_uri(root: Path) -> str:
    """Return where MLflow stores: MLFLOW_TRACKING_URI, else ``mlflow.db`` in ``root``.

    A relative SQLite path is relative to ``root`` too: an experiment's temporary copy is deleted.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    return uri


def database(root: Path) -> Path | None:
    """Return the file of MLflow's SQLite database, there or not; None where it stores elsewhere."""
    uri = tracking_uri(root)
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(text: str) -> str:
    """Remove user and password from the addresses in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)
