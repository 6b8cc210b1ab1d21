"""A model repository for the ONNX Runtime backend of Triton Inference Server.

The format of the repository and of ``config.pbtxt``:
https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes, write_text
from mnist_batchnorm.core.paths import REGISTERED
from mnist_batchnorm.package.proven import Proven, ProvenModel
from mnist_batchnorm.package.templating import fill
from mnist_batchnorm.serve.core.settings import Settings

# ONNX's element type -> Triton's; the only one of this project's networks
DATA_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32"}
SERVER = Settings()  # same limits as `mnist-bn serve`
WARM_BATCH = 32  # images of the warm-up's larger batch


@dataclass(frozen=True)
class Tensor:
    """An input or output in ``config.pbtxt``; ``dims`` has no batch axis."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def write_triton(proven: Proven, directory: Path) -> None:
    """Write a model repository into an empty folder.

    Raises:
        UserError: A batch-norm model has no number in ``models/registry.json``.
        CheckFailedError: Triton cannot batch a file's inputs or outputs.
    """
    # the first image of each digit
    digits, first = np.unique(proven.split.labels, return_index=True)
    images = {f"digit-{d}": image for d, image in zip(digits, proven.images[first], strict=True)}
    for model in proven.models:
        folder = directory / model.name
        write_bytes(folder / str(version_number(model)) / "model.onnx", model.content)
        write_text(folder / "config.pbtxt", config(model, list(images), proven.versions))
        for file, image in images.items():
            write_bytes(folder / "warmup" / file, image.astype("<f4").tobytes())


def config(model: ProvenModel, warm_up: Sequence[str], versions: Mapping[str, str]) -> str:
    inputs, outputs = interface(model)
    batch = (f"{warm_up[0]}-x{WARM_BATCH}", WARM_BATCH, warm_up[0])
    return fill(
        "config.pbtxt.j2",
        name=model.name,
        version=version_number(model),
        inputs=inputs,
        outputs=outputs,
        samples=[*((file, 1, file) for file in warm_up), batch],
        max_rows=SERVER.limits.rows,
        max_queue=SERVER.queue,
        onnxruntime=versions["onnxruntime"],
        parameters={"mnist_batchnorm.sha256": model.sha256, **model.metadata},
        quote=quote,
    )


def interface(model: ProvenModel) -> tuple[list[Tensor], list[Tensor]]:
    """Return a file's inputs and outputs; CheckFailedError unless Triton can batch them."""
    graph = onnx.load_model_from_string(model.content).graph
    given = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    return [_tensor(model, v) for v in inputs], [_tensor(model, v) for v in graph.output]


def _tensor(model: ProvenModel, value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    axes = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    fixed = [size for size in axes[1:] if isinstance(size, int)]
    if kind.elem_type not in DATA_TYPES or not isinstance(axes[0], str) or axes[1:] != fixed:
        raise CheckFailedError(
            f"{model.path}: {value.name} is {onnx.TensorProto.DataType.Name(kind.elem_type)} "
            f"{axes}, expected FLOAT, the batch axis without a fixed size and the others with one"
        )
    return Tensor(value.name, DATA_TYPES[kind.elem_type], tuple(fixed))


def version_number(model: ProvenModel) -> int:
    # the name of the version folder; the plain network, which is not registered, is always 1
    if model.number is None and model.name in REGISTERED:
        raise UserError(
            f"{model.path} has no version number yet, and Triton needs one; run `dvc repro "
            "register` first"
        )
    return 1 if model.number is None else int(model.number)


def quote(text: str) -> str:
    """Quote a string for protobuf's text format: bytes other than plain ASCII in octal."""
    plain = set(range(32, 127)) - {*b'"\\'}
    escaped = (chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(escaped)}"'
