"""Tool rollback: the champion before the present one comes back."""

import click

from mnist_batchnorm.artifacts.registry_file import Ledger, RolledBack, locked
from mnist_batchnorm.commands.champion import announce, reason, require_registry, when, who
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import REGISTRY


def roll_back(ledger: Ledger, why: str | None) -> Ledger:
    """Take the champion back.

    Raises:
        UserError: There was no champion before it.
        CheckFailedError: That one has no parity, which nothing overrides.
    """
    champion, previous = ledger.champion, ledger.previous_champions
    if champion is None or not previous:
        raise UserError(f"{ledger.headline}, and there was none before: nothing to roll back to")
    back = previous[0]
    if "parity" in back.decision.refusals:
        raise CheckFailedError(
            f"version {back.version} does not come back: parity: "
            f"{back.decision.refusals['parity'].says}; see `mnist-bn promote`"
        )
    event = RolledBack(version=champion.version, to=back.version, who=who(), when=when(), why=why)
    return ledger.with_event(event)


@click.command()
@click.option("--reason", "why", metavar="TEXT", help="Why, for models/registry.json.")
def command(why: str | None) -> None:
    """Put the champion before the present one back; twice goes two back.

    The rules never promote what was rolled back: that takes `mnist-bn promote --override`.
    """
    require_registry()
    said = reason(why or "") or None
    with locked(REGISTRY):
        ledger = roll_back(Ledger.load(REGISTRY), said)
        ledger.save(REGISTRY)
    (*_, event) = ledger.events
    click.echo(f"version {event.version} rolled back")
    announce(ledger)
