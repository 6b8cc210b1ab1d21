"""Where MLflow stores, and addresses of pages of its UI. Imports nothing of MLflow."""

import os
import re
from pathlib import Path
from urllib.parse import quote

# MLflow's front page is about language models; this is the part about training
WORKFLOW = "workflowType=machine_learning"
TRAINING_RUNS = "tags.dvc.stage = 'train'"  # without the runs of stage seeds


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, else the SQLite database ``mlflow.db`` in ``root``.

    A relative SQLite path is relative to ``root`` too: an experiment's temporary copy is deleted.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    return uri


def database_path(root: Path) -> Path | None:
    """Return the path of MLflow's SQLite database, existing or not; None for another store."""
    uri = tracking_uri(root)
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(text: str) -> str:
    """Remove user and password from the addresses in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def is_server(uri: str) -> bool:
    """Whether MLflow stores on an HTTP server."""
    return uri.startswith(("http:", "https:"))


def charts_page(experiment_id: str, query: str = TRAINING_RUNS) -> str:
    """Return the page with the learning curves of an experiment's runs that a query finds."""
    runs = f"#/experiments/{experiment_id}/runs?{WORKFLOW}"
    return f"{runs}&compareRunsMode=CHART&searchFilter={quote(query)}"
