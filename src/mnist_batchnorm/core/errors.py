"""The two ways a command ends other than well; ``cli.main`` turns them into exit statuses."""

import re

CPU_ALLOCATOR = "DefaultCPUAllocator"  # in PyTorch's message


class UserError(Exception):
    """The caller's mistake: exit status 2.

    The message says what was wrong, where, and what to do about it.
    """


class CheckFailedError(Exception):
    """The check that a command exists for did not hold: exit status 1."""


def as_users_mistake(error: Exception) -> Exception | None:
    """Say in a person's words what ended the training; None for a bug."""
    if isinstance(error, UserError | CheckFailedError):
        return error
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        return UserError(str(error))
    # on the CPU, PyTorch's is any RuntimeError
    name, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or CPU_ALLOCATOR in text:
        asked = re.search(
            r"(can't|unable to|tried to) allocate .*?(bytes|iB)\b", text, re.IGNORECASE
        )
        return UserError(
            "not enough memory to train: lower train.batch_size, train.hidden or the number of "
            "seeds in params.yaml "
            f"({asked[0] if asked else name})"
        )
    return None
