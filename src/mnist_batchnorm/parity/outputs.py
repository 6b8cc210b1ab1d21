"""Does ONNX Runtime compute what the network means, at every batch size and optimization level?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

from mnist_batchnorm.parity.report import Check, finite, one_line, verdict

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
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the last bits depend on how the rows are shared out
        try:
            with torch.inference_mode():
                pytorch = model(tensor).numpy()
                exact = model.double()(tensor.double()).numpy()
        finally:
            torch.set_num_threads(threads)
        model.float()  # exact: every weight was a float32
        return cls(inputs, labels, exact, pytorch)


def relative_error(logits: Float32, exact: Float32 | Float64) -> Float64:
    """Return each row's largest error over the row's largest exact logit, ``[n]``.

    Not each logit's own relative error: near zero that is large for any honest runtime.
    NaN and infinity count as `LARGEST`.
    """
    size = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny)
    return finite(np.abs(logits - exact.astype(np.float64)).max(axis=1) / size)


def check_outputs(
    content: bytes, reference: Reference, batch_sizes: Sequence[int], limit: float
) -> tuple[Check, Float64 | None]:
    """Run all images through ONNX Runtime at every batch size and optimization level.

    Args:
        content: the ONNX file.
        reference: the images and what the network makes of them.
        batch_sizes: images a call; the last call of a pass takes what is left.
        limit: largest `relative_error` against the float64 reference.

    Returns:
        The check, and each image's largest `relative_error` of all passes, float64 ``[n]``; None
        when no pass ran to its end.
    """
    problems: list[str] = []
    passes: list[dict[str, Any]] = []
    errors: Float64 | None = None
    first: Float32 | None = None
    for level, setting in LEVELS.items():
        try:
            run = session(content, setting)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no other base
            problems.append(f"ONNX Runtime cannot load it at level {level}: {one_line(error)}")
            continue
        for batch_size in batch_sizes:
            where = f"level {level}, batch {batch_size}"
            try:
                logits = run_in_batches(run, reference.inputs, batch_size)
            except Exception as error:  # noqa: BLE001
                problems.append(f"{where}: ONNX Runtime fails: {one_line(error)}")
                continue
            if logits.dtype != np.float32 or logits.shape != reference.exact.shape:
                problems.append(
                    f"{where}: output is {logits.dtype} {logits.shape}, "
                    f"expected float32 {reference.exact.shape}"
                )
                continue
            row_errors = relative_error(logits, reference.exact)
            errors = row_errors if errors is None else np.maximum(errors, row_errors)
            evidence, trouble = _compare(logits, row_errors, reference, limit)
            first = logits if first is None else first
            evidence["same_bits"] = bool(np.array_equal(logits, first, equal_nan=True))
            passes.append({"level": level, "batch_size": batch_size, **evidence})
            problems += [f"{where}: {text}" for text in trouble]
    if not passes:
        problems.append("no pass ran to its end, so nothing was compared")
    worst = _largest(passes, "max_relative_error")
    check = verdict(
        "outputs",
        problems,
        f"{len(reference.inputs):,} images, {len(passes)} passes: largest error "
        f"{worst or 0:.2g} of the row's largest logit (limit {limit:g}), no argmax differs",
        {
            "max_relative_error": worst,
            "limit": limit,
            "max_relative_error_vs_pytorch": _largest(passes, "max_relative_error_vs_pytorch"),
            "argmax_differences": _largest(passes, "argmax_differences"),
            "accuracy": min((p["accuracy"] for p in passes), default=None),
            "same_bits_in_every_pass": bool(passes) and all(p["same_bits"] for p in passes),
            "pytorch_max_relative_error": float(
                relative_error(reference.pytorch, reference.exact).max(initial=0)
            ),
            "passes": passes,
        },
    )
    return check, errors


def _largest(passes: list[dict[str, Any]], key: str) -> Any:
    return max((p[key] for p in passes), default=None)


def _compare(
    logits: Float32, error: Float64, reference: Reference, limit: float
) -> tuple[dict[str, Any], list[str]]:
    image = int(error.argmax())
    worst = float(error[image])
    problems = []
    if worst > limit:
        logit = int(np.abs(logits[image] - reference.exact[image]).argmax())
        problems.append(
            f"{int((error > limit).sum()):,} images beyond {limit:g} of the row's largest logit; "
            f"worst image {image}, logit {logit}: {logits[image, logit]:.9g}, "
            f"float64 gives {reference.exact[image, logit]:.9g} ({worst:.3g})"
        )
    predicted = logits.argmax(axis=1)
    exact, pytorch = reference.exact.argmax(axis=1), reference.pytorch.argmax(axis=1)
    undecided = pytorch != exact
    differs = (predicted != exact) & ~undecided
    if differs.any():
        at = int(differs.argmax())
        problems.append(
            f"{int(differs.sum()):,} predictions differ, first at image {at}: "
            f"{predicted[at]}, PyTorch says {pytorch[at]}"
        )
    if undecided.any():
        at = int(undecided.argmax())
        problems.append(
            f"{int(undecided.sum()):,} predictions have no reference, first at image {at}: "
            f"{pytorch[at]}, float64 says {exact[at]}: "
            "PyTorch's own float32 disagrees with float64 here"
        )
    accuracy = float((predicted == reference.labels).mean())
    return (
        {
            "max_relative_error": worst,
            "max_relative_error_vs_pytorch": float(relative_error(logits, reference.pytorch).max()),
            "worst_image": image,
            "argmax_differences": int((differs | undecided).sum()),
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
