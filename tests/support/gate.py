"""The parity gate and PyTorch's ONNX exporter, made faster for tests."""

import functools
from collections.abc import Iterator

import pytest
from torch.onnx._internal.exporter import _registration

from mnist_batchnorm.parity import invariance


@pytest.fixture(scope="module")
def few_passes() -> Iterator[None]:
    """Skip the passes over thousands of rows and with two threads, nine tenths of the time.

    For bad files, which a gate with fewer checks would rather miss; test_honest and
    test_honest_files run all passes.
    """
    few = [s for s in invariance.SETTINGS if s.batch_size < 1000 and s.threads == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariance, "SETTINGS", few)
        yield


def reuse_function_registry() -> None:
    """Build the exporter's table of ONNX functions once per process: half the time of an export."""
    registry = _registration.ONNXRegistry
    if not isinstance(vars(registry)["from_torchlib"], staticmethod):
        cached = functools.cache(registry.from_torchlib)
        registry.from_torchlib = staticmethod(cached)  # type: ignore[method-assign]
