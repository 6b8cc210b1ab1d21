"""ONNX Runtime on the CPU: without log output, with one error type, and with cached passes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.parity.report import one_line

# Since 1.32 the Linux wheel too sends telemetry, and writes a device id to the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

Level = Literal["disabled", "basic", "extended", "all"]

LEVELS: Mapping[Level, ort.GraphOptimizationLevel] = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
LOG_FATAL = 4  # log severity: the exceptions carry the errors
BATCH_SIZE = 1000  # default


class RuntimeFailedError(Exception):
    """ONNX Runtime cannot load or run a model; the message is one line."""


class WrongOutputError(RuntimeFailedError):
    """The model runs, but its output has another type or shape than expected."""


@dataclass(frozen=True)
class Session:
    """A loaded model with one input, its first output, and its ``metadata_props``."""

    input: str
    output: str
    metadata: dict[str, str]
    _session: ort.InferenceSession = field(repr=False)

    def run(self, batch: Float32) -> npt.NDArray[Any]:
        """Run one batch, ``[n, ...]``.

        Raises:
            RuntimeFailedError: ONNX Runtime fails.
            WrongOutputError: The output is not a tensor with one row per input.
        """
        try:
            (output,) = self._session.run([self.output], {self.input: batch})
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no other base
            raise RuntimeFailedError(f"ONNX Runtime fails: {one_line(error)}") from None
        if not isinstance(output, np.ndarray):
            raise WrongOutputError(f"{self.output} is no tensor but a {type(output).__name__}")
        if output.shape[:1] != (len(batch),):
            raise WrongOutputError(
                f"{self.output} has shape {output.shape} for a batch of {len(batch)}"
            )
        return output

    def run_in_batches(self, inputs: Float32, batch_size: int) -> npt.NDArray[Any]:
        """Run all inputs in batches, of which the last may be smaller, and join the outputs.

        Raises:
            RuntimeFailedError: ONNX Runtime fails.
            WrongOutputError: As `run`, or the batches' outputs differ in type or shape.
        """
        starts = range(0, len(inputs), batch_size) or [0]  # no inputs: one empty batch
        outputs = [self.run(inputs[start : start + batch_size]) for start in starts]
        first = outputs[0]
        for other in outputs:
            if other.dtype != first.dtype or other.shape[1:] != first.shape[1:]:
                raise WrongOutputError(
                    f"{self.output} has rows of {first.dtype} {first.shape[1:]} and of "
                    f"{other.dtype} {other.shape[1:]}"
                )
        return np.concatenate(outputs)


def load(content: bytes, level: Level = "all", threads: int = 1) -> Session:
    """Load an ONNX file on the CPU, with a graph optimization level and threads per operator.

    Raises:
        RuntimeFailedError: The model cannot be loaded, or does not have exactly one input.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        inputs = [node.name for node in session.get_inputs()]
        outputs = [node.name for node in session.get_outputs()]
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # noqa: BLE001
        raise RuntimeFailedError(f"ONNX Runtime cannot load it: {one_line(error)}") from None
    if len(inputs) != 1 or not outputs:
        raise RuntimeFailedError(
            f"takes {len(inputs)} inputs ({', '.join(inputs)}) and gives {len(outputs)} outputs, "
            "expected one input"
        )
    return Session(inputs[0], outputs[0], metadata, session)


class Passes:
    """Runs an ONNX file, and caches sessions and outputs."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._sessions: dict[tuple[Level, int], Session] = {}
        self._outputs: dict[tuple[str, Level], npt.NDArray[Any]] = {}

    def session(self, level: Level, threads: int = 1) -> Session:
        """Load the file as `load`, once per level and number of threads."""
        key = (level, threads)
        if key not in self._sessions:
            self._sessions[key] = load(self._content, level, threads)
        return self._sessions[key]

    def run(self, name: str, inputs: Float32, level: Level = "all") -> npt.NDArray[Any]:
        """Run inputs, ``[n, ...]``, once per ``name`` and level.

        Raises:
            RuntimeFailedError: As `session` and `Session.run_in_batches`.
        """
        key = (name, level)
        if key not in self._outputs:
            self._outputs[key] = self.session(level).run_in_batches(inputs, BATCH_SIZE)
        return self._outputs[key]
