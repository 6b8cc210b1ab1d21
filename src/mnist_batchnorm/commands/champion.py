"""What `promote` and `rollback` share: a person moves the champion, and the ledger says who.

Stage register imports none of this, so nothing that `announce` may come to call is its dependency.
"""

import getpass
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import click

from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import REGISTRY

REASON = 500  # characters


def require_registry() -> None:
    """Make sure that something has been registered here, before anything is locked or written.

    Raises:
        UserError: There is no ledger.
    """
    if not REGISTRY.exists():
        raise UserError(f"no {REGISTRY} in {Path.cwd()}; run `dvc repro register` first")


def who() -> str:
    """Return the person's name and address as git has them, else the name of the account."""
    name, email = _git_config("user.name"), _git_config("user.email")
    if name or email:
        return " ".join(part for part in (name, email and f"<{email}>") if part)
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _git_config(key: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "config", key],  # noqa: S607
            capture_output=True,
            check=False,
        )
    except OSError:  # no git here
        return ""
    return as_text(done.stdout.decode(errors="replace"))


def as_text(words: str) -> str:
    """Return words on one line, as UTF-8 can hold them."""
    return " ".join(words.encode(errors="replace").decode().split())


def reason(words: str) -> str:
    """Return a reason as the ledger holds it.

    Raises:
        UserError: It is longer than MLflow's descriptions, which show it, leave room for.
    """
    text = as_text(words)
    if len(text) > REASON:
        raise UserError(f"a reason of {len(text)} characters is too long; at most {REASON}")
    return text


def when() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def announce(ledger: Ledger, *, to_stderr: bool = False) -> None:
    """Say which version is champion now, and tell MLflow: how both commands end."""
    from mnist_batchnorm.mlflow_sync.sync import show_registry

    click.echo(ledger.headline, err=to_stderr)
    show_registry()
