from collections.abc import Callable

import numpy as np
import pytest
import torch

from mnist_batchnorm.core.errors import CheckFailedError, UserError, as_expected_error


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
    )


def out_of_memory_in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("allocate", "reason"),
    [
        (
            lambda: torch.empty(2**45),  # more than an address space holds
            "can't allocate memory: you tried to allocate 140737488355328 bytes",
        ),
        (lambda: np.empty(2**45), "Unable to allocate 256. TiB"),
        (out_of_memory_on_a_gpu, "Tried to allocate 20.00 MiB"),
        (out_of_memory_in_python, "MemoryError"),
    ],
    ids=["PyTorch", "NumPy", "GPU", "Python"],
)
def test_memory_that_runs_out_is_the_users_mistake(
    allocate: Callable[[], object], reason: str
) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        allocate()
    expected = as_expected_error(raised.value)
    assert isinstance(expected, UserError)
    assert str(expected) == (
        "not enough memory to train: lower train.batch_size, train.hidden or the number of "
        f"seeds in params.yaml ({reason})"
    )


@pytest.mark.parametrize("bug", [RuntimeError("shapes do not fit"), KeyError("x"), ValueError()])
def test_bug_is_not_expected(bug: Exception) -> None:
    assert as_expected_error(bug) is None


@pytest.mark.parametrize("error", [UserError("a"), CheckFailedError("b")])
def test_expected_errors_stay_as_they_are(error: Exception) -> None:
    assert as_expected_error(error) is error


def test_error_of_the_system_is_the_users_mistake() -> None:
    expected = as_expected_error(OSError(28, "No space left on device"))
    assert isinstance(expected, UserError)
    assert str(expected) == "[Errno 28] No space left on device"
