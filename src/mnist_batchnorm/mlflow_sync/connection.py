"""Import MLflow quietly, connect to its store, and put its errors in one line."""

import logging
import os
import sys
from pathlib import Path

import click

from mnist_batchnorm.core.files import replacing
from mnist_batchnorm.mlflow_sync.uri import tracking_uri, without_password

# MLflow's own defaults wait for minutes before a server counts as dead. The user's settings take
# precedence.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds
    # A request that timed out may have succeeded: `RunStore` searches before it repeats one.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # otherwise pages of warnings where git is not installed
}


def import_mlflow() -> None:
    """Import MLflow so that it is quiet and gives up soon on a store that cannot be reached."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # the exceptions contain what these would log
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    import mlflow.store.db.utils

    # the variable has no effect if MLflow was imported before
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # otherwise 100 s for an unreachable database


def is_database(uri: str) -> bool:
    """Whether MLflow stores in a database that this process connects to itself."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    return uri.startswith(tuple(DATABASE_ENGINES))


def create_database(path: Path, artifacts: str) -> None:
    """Create MLflow's SQLite database atomically if it is missing.

    MLflow migrates an empty database step by step, which takes seconds; a process killed on the
    way would leave one that no later run can open.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if not path.exists():
        with replacing(path) as temporary:
            SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()


def describe_error(error: Exception, root: Path) -> str:
    """Describe in one line, without password, what is wrong with the store."""
    cause: BaseException = error
    while following := (cause.__cause__ or (not cause.__suppress_context__ and cause.__context__)):
        cause = following
    # of a network error only the innermost is short: "[Errno 111] Connection refused"
    reason = str(cause if isinstance(cause, OSError) else error) or type(error).__name__
    return without_password(f"MLflow at {tracking_uri(root)}: {reason.splitlines()[0]}")


def warn(error: Exception, root: Path) -> None:
    """Write a one-line warning about the store to stderr."""
    start = "\n" if sys.stderr.isatty() else ""  # below the progress bar
    click.echo(f"{start}warning: {describe_error(error, root)}", err=True)
