"""Exit statuses, and the one line on stderr that explains a failure."""

from collections.abc import Callable

import click

from mnist_batchnorm.core.errors import CheckFailedError, UserError


def status_of(work: Callable[[], int | None]) -> int:
    """Run `work`, print an expected failure in one line on stderr, and return the exit status."""
    try:
        return work() or 0
    except click.ClickException as mistake:
        mistake.show()
        return mistake.exit_code
    except CheckFailedError as failure:
        click.echo(f"FAILED: {failure}", err=True)
        return 1
    except UserError as mistake:
        click.echo(f"error: {mistake}", err=True)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        click.echo(f"error: {error}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130  # 128 + SIGINT, as shells report it
