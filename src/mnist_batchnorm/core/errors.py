"""The two expected failures of a command; ``core.exit`` turns them into exit statuses."""

import re

CPU_ALLOCATOR = "DefaultCPUAllocator"  # names PyTorch's out-of-memory error on the CPU


class UserError(Exception):
    """The caller's mistake: exit status 2.

    The message says what was wrong, where, and what to do about it.
    """


class CheckFailedError(Exception):
    """A check that the command performs has failed: exit status 1."""


def as_expected_error(error: Exception) -> UserError | CheckFailedError | None:
    """Translate an expected failure of a training into a UserError; None if unexpected."""
    if isinstance(error, UserError | CheckFailedError):
        return error
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        return UserError(str(error))
    # on the CPU, PyTorch raises a plain RuntimeError
    name, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or CPU_ALLOCATOR in text:
        request = re.search(
            r"(can't|unable to|tried to) allocate .*?(bytes|iB)\b", text, re.IGNORECASE
        )
        return UserError(
            "not enough memory to train: lower train.batch_size, train.hidden or the number of "
            "seeds in params.yaml "
            f"({request[0] if request else name})"
        )
    return None
