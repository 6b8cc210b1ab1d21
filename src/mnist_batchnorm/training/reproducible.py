"""Training with the same bits on every x86-64 processor that has AVX2, whoever made it.

What decides the last bits of a training on the CPU, besides the numbers that go in: the vector
width that PyTorch's own kernels are compiled for (ATen capability), the branch that MKL takes for
its matrix products (by instruction set and by vendor), and the number of threads. Fixed here, one
way for all; the number of threads is 1 in any case (`fit.make_deterministic`).
"""

import os
import platform
import sys

from mnist_batchnorm.core.errors import UserError

# MKL_CBWR=AVX2 would be faster, but on processors that are not Intel's MKL ignores it:
# https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-0/reproducibility-conditions.html
SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}


def make_portable() -> None:
    """Fix what differs between processors; call it before PyTorch is imported.

    Raises:
        UserError: On this machine, or with this PyTorch, the bits would be others.
    """
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch is imported already, and has chosen its kernels")
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise unable(f"this processor is {machine}, not x86-64")
    os.environ.update(SETTINGS)
    import torch

    if not torch.cpu._is_avx2_supported():  # its kernels for AVX2 would be an illegal instruction
        raise unable("this processor has no AVX2")
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        raise unable(f"PyTorch {torch.__version__} here is a build without MKL")


def unable(why: str) -> UserError:
    """Make the error for a machine on which a portable training cannot be had."""
    return UserError(f"params.yaml: train.portable: {why}; set it to false")
