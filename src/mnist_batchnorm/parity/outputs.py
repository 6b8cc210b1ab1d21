"""Does ONNX Runtime compute what the network means, at every batch size and optimization level?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

from mnist_batchnorm.parity.report import Check, verdict

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Reference:
    """What the network computes for the images that the gate tries, in eval mode.

    Attributes:
        inputs: float32 ``[n, inputs]``, as the ONNX graph takes them.
        labels: integers ``[n]``.
        exact: float64 ``[n, outputs]``: the same float32 weights and inputs, float64 arithmetic.
        pytorch: float32 ``[n, outputs]``: PyTorch's own arithmetic, all images in one batch.
    """

    inputs: Float32
    labels: npt.NDArray[np.uint8]
    exact: Float64
    pytorch: Float32

    @classmethod
    def compute(
        cls, model: nn.Module, inputs: Float32, labels: npt.NDArray[np.uint8]
    ) -> "Reference":
        """Run a network in eval mode; the model itself is left in float32."""
        tensor = torch.from_numpy(inputs)
        with torch.inference_mode():
            pytorch = model(tensor).numpy()
            exact = model.double()(tensor.double()).numpy()
        model.float()  # exact: every weight was a float32
        return cls(inputs, labels, exact, pytorch)


def relative_error(logits: Float32, exact: Float64) -> Float64:
    """Return each row's largest error over the row's largest exact logit, ``[n]``.

    Not each logit's own relative error: near zero that is large for any honest runtime.
    NaN counts as infinite.
    """
    size = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny)
    error = np.abs(logits - exact).max(axis=1) / size
    return np.where(np.isnan(error), np.inf, error)


def check_outputs(
    content: bytes, reference: Reference, batch_sizes: Sequence[int], limit: float
) -> Check:
    """Run all images through ONNX Runtime at every batch size and optimization level.

    Args:
        content: the ONNX file.
        reference: the images and what the network makes of them.
        batch_sizes: images a call; the last call of a pass takes what is left.
        limit: largest `relative_error` against the float64 reference.
    """
    problems: list[str] = []
    passes: list[dict[str, Any]] = []
    first: Float32 | None = None
    for level, setting in LEVELS.items():
        try:
            run = session(content, setting)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no other base
            problems.append(f"ONNX Runtime cannot load it at level {level}: {_one_line(error)}")
            continue
        for batch_size in batch_sizes:
            where = f"level {level}, batch {batch_size}"
            try:
                logits = run_in_batches(run, reference.inputs, batch_size)
            except Exception as error:  # noqa: BLE001
                problems.append(f"{where}: ONNX Runtime fails: {_one_line(error)}")
                continue
            if logits.shape != reference.exact.shape:
                problems.append(
                    f"{where}: output has shape {logits.shape}, expected {reference.exact.shape}"
                )
                continue
            evidence, trouble = _compare(logits, reference, limit)
            first = logits if first is None else first
            evidence["same_bits"] = bool(np.array_equal(logits, first, equal_nan=True))
            passes.append({"level": level, "batch_size": batch_size, **evidence})
            problems += [f"{where}: {text}" for text in trouble]
    worst = max((p["max_relative_error"] for p in passes), default=None)
    return verdict(
        "outputs",
        problems,
        f"{len(reference.inputs):,} images, {len(passes)} passes: largest error "
        f"{worst or 0:.2g} of the row's largest logit (limit {limit:g}), no argmax differs",
        {
            "max_relative_error": worst,
            "limit": limit,
            "argmax_differences": max((p["argmax_differences"] for p in passes), default=None),
            "accuracy": min((p["accuracy"] for p in passes), default=None),
            "same_bits_in_every_pass": all(p["same_bits"] for p in passes),
            "pytorch_max_relative_error": float(
                relative_error(reference.pytorch, reference.exact).max()
            ),
            "passes": passes,
        },
    )


def _compare(
    logits: Float32, reference: Reference, limit: float
) -> tuple[dict[str, Any], list[str]]:
    error = relative_error(logits, reference.exact)
    predicted = logits.argmax(axis=1)
    differs = (predicted != reference.exact.argmax(axis=1)) | (
        predicted != reference.pytorch.argmax(axis=1)
    )
    image = int(error.argmax())
    worst = min(float(error[image]), float(np.finfo(np.float64).max))  # JSON has no infinity
    problems = []
    if worst > limit:
        logit = int(np.abs(logits[image] - reference.exact[image]).argmax())
        problems.append(
            f"{int((error > limit).sum()):,} images beyond {limit:g} of the row's largest logit; "
            f"worst image {image}, logit {logit}: {logits[image, logit]:.9g}, "
            f"float64 gives {reference.exact[image, logit]:.9g} ({worst:.3g})"
        )
    if differs.any():
        at = int(differs.argmax())
        problems.append(
            f"{int(differs.sum()):,} predictions differ, first at image {at}: "
            f"{int(predicted[at])}, PyTorch says {int(reference.pytorch[at].argmax())}"
        )
    accuracy = float((predicted == reference.labels).mean())
    return (
        {
            "max_relative_error": worst,
            "worst_image": image,
            "argmax_differences": int(differs.sum()),
            "accuracy": accuracy,
        },
        problems,
    )


def session(content: bytes, level: ort.GraphOptimizationLevel) -> Callable[[Float32], Float32]:
    """Load an ONNX file on the CPU provider and return a function from a batch to its logits."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3  # errors only: what it would warn of, the gate reports
    loaded = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = loaded.get_inputs()[0].name
    return lambda batch: loaded.run(None, {name: batch})[0]


def run_in_batches(run: Callable[[Float32], Float32], inputs: Float32, batch_size: int) -> Float32:
    """Run all inputs, ``batch_size`` at a time, and join the outputs."""
    starts = range(0, len(inputs), batch_size)
    return np.concatenate([run(inputs[start : start + batch_size]) for start in starts])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
