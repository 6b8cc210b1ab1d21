"""Training with the same bits on every x86-64 processor that has AVX2, of any vendor.

Besides its input, the last bits of a training on the CPU depend on the vector width of PyTorch's
kernels (ATen capability), on MKL's branch for matrix products (by instruction set and by vendor),
and on the number of threads. The first two are fixed here; the number of threads is always 1
(`devices.make_deterministic`).
"""

import os
import platform
import sys

from mnist_batchnorm.core.errors import UserError

# MKL_CBWR=AVX2 would be faster, but on processors that are not Intel's MKL ignores it:
# https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-0/reproducibility-conditions.html
SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}


def make_reproducible() -> None:
    """Fix what differs between processors; call it before PyTorch is imported.

    Raises a UserError if this machine or this PyTorch cannot compute the same bits.
    """
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch is imported already, and has chosen its kernels")
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise _unsupported(f"this processor is {machine}, not x86-64")
    os.environ.update(SETTINGS)
    import torch

    if not torch.cpu._is_avx2_supported():  # its kernels for AVX2 would be an illegal instruction
        raise _unsupported("this processor has no AVX2")
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        raise _unsupported(f"PyTorch {torch.__version__} here is a build without MKL")


def _unsupported(why: str) -> UserError:
    return UserError(f"params.yaml: train.portable: {why}; set it to false")
