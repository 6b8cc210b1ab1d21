"""Tool rollback: the champion before the present one comes back."""

import click

from mnist_batchnorm.byhand import announce, as_text, require_registry, when, who
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.layout import REGISTRY
from mnist_batchnorm.ledger import Ledger, RolledBack, locked


def roll_back(ledger: Ledger, why: str | None) -> Ledger:
    """Take the champion back.

    Raises:
        UserError: There was no champion before it.
    """
    champion, previous = ledger.champion, ledger.previous_champions
    if champion is None or not previous:
        raise UserError(f"{ledger.headline}, and there was none before: nothing to roll back to")
    event = RolledBack(
        version=champion.version, to=previous[0].version, who=who(), when=when(), why=why
    )
    return ledger.with_event(event)


@click.command()
@click.option("--reason", metavar="TEXT", help="Why, for models/registry.json.")
def command(reason: str | None) -> None:
    """Put the champion before the present one back; twice goes two back.

    The rules never promote what was rolled back: that takes `mnist-bn promote --override`.
    """
    require_registry()
    why = as_text(reason or "") or None
    with locked(REGISTRY):
        ledger = roll_back(Ledger.load(REGISTRY), why)
        ledger.save(REGISTRY)
    (*_, event) = ledger.events
    click.echo(f"version {event.version} rolled back")
    announce(ledger)
