"""The two ways a command ends other than well; ``cli.main`` turns them into exit statuses."""


class UserError(Exception):
    """The caller's mistake: exit status 2.

    The message says what was wrong, where, and what to do about it.
    """


class CheckFailedError(Exception):
    """The check that a command exists for did not hold: exit status 1."""
