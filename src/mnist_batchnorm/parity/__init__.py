"""The parity gate: does the ONNX file on disk compute what the checkpoint on disk computes?"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_batchnorm.parity.gate import Gate, assert_parity, check
    from mnist_batchnorm.parity.report import Check, Diagnosis, ParityReport

__all__ = ["Check", "Diagnosis", "Gate", "ParityReport", "assert_parity", "check"]


def __getattr__(name: str) -> Any:
    """Import the gate when it is asked for: `parity.runtime` alone does without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "report" if name in {"Check", "Diagnosis", "ParityReport"} else "gate"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
