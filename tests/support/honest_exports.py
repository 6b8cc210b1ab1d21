"""Correct exports: the common exporters and simplifiers."""

from collections.abc import Callable
from pathlib import Path

import onnx

from tests.support.parity_cases import Case, legacy_export

Export = Callable[[Case], onnx.ModelProto]


def simplified(graph: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim  # 1 s

    simple, _ = onnxsim.simplify(graph)
    return simple


def slimmed(graph: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim  # 1 s

    slim = onnxslim.slim(graph)
    assert isinstance(slim, onnx.ModelProto)
    return slim


HONEST: dict[str, Export] = {
    "kept": Case.kept,
    "folded": Case.folded,
    "legacy": Case.legacy,
    "legacy_folded": lambda case: legacy_export(case.model, case.inputs, fold=True),
    "onnxsim_kept": lambda case: simplified(case.kept()),
    "onnxsim_folded": lambda case: simplified(case.folded()),
    "onnxsim_legacy": lambda case: simplified(case.legacy()),
    "onnxslim_kept": lambda case: slimmed(case.kept()),
    "onnxslim_folded": lambda case: slimmed(case.folded()),
    "onnxslim_legacy": lambda case: slimmed(case.legacy()),
}


def make_honest(name: str, case: Case, folder: Path) -> Path:
    """Write a correct export of a case to a folder; return the ONNX file's path."""
    path = folder / f"{case.weights.stem}-{name}.onnx"
    onnx.save(HONEST[name](case), path)
    return path
