"""Command rollback: restore the previous champion."""

import click

from mnist_batchnorm.artifacts.registry_file import Ledger, RolledBack, locked
from mnist_batchnorm.commands.champion import (
    publish_champion,
    require_registry,
    validate_reason,
    who_and_when,
)
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import REGISTRY


def roll_back(ledger: Ledger, why: str | None) -> Ledger:
    """Return a ledger in which the previous champion, if it has parity, is restored."""
    champion, previous = ledger.champion, ledger.previous_champions
    if champion is None or not previous:
        raise UserError(f"{ledger.headline}, and there was none before: nothing to roll back to")
    restored = previous[0]
    if "parity" in restored.decision.refusals:
        raise CheckFailedError(
            f"version {restored.version} does not come back: parity: "
            f"{restored.decision.refusals['parity'].says}; see `mnist-bn promote`"
        )
    return ledger.with_event(
        RolledBack(version=champion.version, to=restored.version, why=why, **who_and_when())
    )


@click.command()
@click.option("--reason", metavar="TEXT", default="", help="Recorded in models/registry.json.")
def command(reason: str) -> None:
    """Restore the previous champion; repeat to go back further.

    The rules never promote what was rolled back: that takes `mnist-bn promote --override`.
    """
    require_registry()
    why = validate_reason(reason) or None
    with locked(REGISTRY):
        ledger = roll_back(Ledger.load(REGISTRY), why)
        ledger.save(REGISTRY)
    click.echo(f"version {ledger.events[-1].version} rolled back")
    publish_champion(ledger)
