"""What `promote` and `rollback` share: a person changes the champion, and the ledger records who.

Not in `promotion`, so that stage register does not depend on how MLflow is updated.
"""

import getpass
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import REGISTRY

MAX_REASON_CHARS = 500  # MLflow's descriptions, which show it, are limited


def require_registry() -> None:
    """Raise UserError if nothing has been registered here; before anything is locked or written."""
    if not REGISTRY.exists():
        raise UserError(f"no {REGISTRY} in {Path.cwd()}; run `dvc repro register` first")


def current_person() -> str:
    """Return the name and address in git's settings, else the account's name."""
    name, email = _git_setting("user.name"), _git_setting("user.email")
    if name or email:
        return " ".join(part for part in (name, email and f"<{email}>") if part)
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _git_setting(key: str) -> str:
    try:
        command = ["git", "config", key]
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    except OSError:  # git is not installed
        return ""
    return to_one_line(done.stdout.decode(errors="replace"))


def to_one_line(text: str) -> str:
    """Collapse white space, and replace what UTF-8 cannot encode."""
    return " ".join(text.encode(errors="replace").decode().split())


def validate_reason(text: str) -> str:
    """Return a reason as the ledger stores it; UserError if it is too long."""
    reason = to_one_line(text)
    if len(reason) > MAX_REASON_CHARS:
        raise UserError(
            f"a reason of {len(reason)} characters is too long; at most {MAX_REASON_CHARS}"
        )
    return reason


def who_and_when() -> dict[str, Any]:
    """Return the person and the time in UTC, ISO 8601, to the second, for an event."""
    return {"who": current_person(), "when": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}


def publish_champion(ledger: Ledger, *, to_stderr: bool = False) -> None:
    """Print the champion and update MLflow's registry."""
    from mnist_batchnorm.mlflow_sync.sync import show_registry

    click.echo(ledger.headline, err=to_stderr)
    show_registry()
