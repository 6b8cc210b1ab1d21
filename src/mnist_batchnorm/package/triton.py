"""A model repository for Triton Inference Server, run there by its ONNX Runtime backend.

The format of the repository and of ``config.pbtxt``:
https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes, write_text
from mnist_batchnorm.core.paths import REGISTERED
from mnist_batchnorm.package.proven import Proven, ProvenModel
from mnist_batchnorm.package.templating import fill
from mnist_batchnorm.serve.core.settings import Settings

# ONNX's element type -> Triton's; what this project's networks take and give
DATA_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32"}
SERVER = Settings()  # what holds for a client of `mnist-bn serve` holds here
WARM_BATCH = 32  # images of the warm-up's larger batch


@dataclass(frozen=True)
class Tensor:
    """An input or output as ``config.pbtxt`` names it.

    Attributes:
        name: the tensor's.
        data_type: Triton's word for its element type.
        dims: its shape without the batch axis.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A request that Triton answers for itself before it says that the model is ready.

    Attributes:
        name: for Triton's log.
        batch_size: how many rows, all of them the same image.
        file: the image's, in the folder ``warmup``.
        image: float32 ``[784]``.
    """

    name: str
    batch_size: int
    file: str
    image: npt.NDArray[np.float32]


def write_triton(proven: Proven, directory: Path) -> None:
    """Fill a folder with a model repository.

    Args:
        proven: the models.
        directory: an empty folder.

    Raises:
        UserError: A batch-norm model has no number in ``models/registry.json``.
        CheckFailedError: A file's interface is none that Triton could batch.
    """
    samples = warm_up(proven)
    for model in proven.models:
        folder = directory / model.name
        write_bytes(folder / str(version_number(model)) / "model.onnx", model.content)
        write_text(folder / "config.pbtxt", config(model, samples, proven.versions))
        for file, image in {sample.file: sample.image for sample in samples}.items():
            write_bytes(folder / "warmup" / file, image.astype("<f4").tobytes())


def config(model: ProvenModel, samples: Sequence[Sample], versions: Mapping[str, str]) -> str:
    """Return a model's ``config.pbtxt``.

    Args:
        model: the model.
        samples: for its warm-up.
        versions: of the packages that the gate proved it with.

    Raises:
        UserError: It has no number in ``models/registry.json``.
        CheckFailedError: Its interface is none that Triton could batch.
    """
    inputs, outputs = interface(model)
    return fill(
        "config.pbtxt.j2",
        name=model.name,
        version=version_number(model),
        inputs=inputs,
        outputs=outputs,
        samples=samples,
        max_rows=SERVER.limits.rows,
        max_queue=SERVER.queue,
        onnxruntime=versions["onnxruntime"],
        parameters={"mnist_batchnorm.sha256": model.sha256, **model.metadata},
        quote=quote,
    )


def interface(model: ProvenModel) -> tuple[list[Tensor], list[Tensor]]:
    """Read a file's inputs and outputs.

    Raises:
        CheckFailedError: One has another element type than float32, or no symbolic batch axis
            before axes of fixed size.
    """
    graph = onnx.load_model_from_string(model.content).graph
    given = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    return (
        [_tensor(model, value) for value in inputs],
        [_tensor(model, value) for value in graph.output],
    )


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
    """Return the name of a model's version folder, which must be a number.

    What nobody registers, the plain network, is always 1.

    Raises:
        UserError: The model is one that is registered, but this file is not.
    """
    if model.number is None and model.name in REGISTERED:
        raise UserError(
            f"{model.path} has no version number yet, and Triton needs one; run `dvc repro "
            "register` first"
        )
    return 1 if model.number is None else int(model.number)


def warm_up(proven: Proven) -> list[Sample]:
    """Choose real images: the first of each digit alone, and one as a larger batch."""
    labels, images = proven.split.labels, proven.images
    chosen = [
        Sample(f"digit-{digit}", 1, f"digit-{digit}", images[where[0]])
        for digit in range(CLASSES)
        if (where := np.flatnonzero(labels == digit)).size
    ]
    first = chosen[0]
    batch = replace(first, name=f"{first.name}-x{WARM_BATCH}", batch_size=WARM_BATCH)
    return [*chosen, batch]


def quote(text: str) -> str:
    """Write a string as protobuf's text format does: other bytes than plain ASCII in octal."""
    return '"' + "".join(map(_escape, text.encode())) + '"'


def _escape(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
