"""What comes with every package: a README, and a request with the answers that it must get."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.core.files import write_text
from mnist_batchnorm.package.proven import Proven
from mnist_batchnorm.package.templating import fill
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT

IMAGES = 3  # in the example request


def write_examples(proven: Proven, folder: Path) -> None:
    """Write ``request.json`` and ``answers.json``.

    The request is one of the Open Inference Protocol, version 2, so every engine takes it; the
    answers are ONNX Runtime's in this process, by the model's name.
    """
    images = proven.images[:IMAGES]
    tensor = {"name": INPUT, "datatype": "FP32", "shape": [len(images), SIDE * SIDE]}
    answers = {
        model.name: {
            "name": OUTPUT,
            "datatype": "FP32",
            "shape": [len(images), CLASSES],
            "data": shortest(model.session.run(images)),
        }
        for model in proven.models
    }
    for file, content in {
        "request.json": {"inputs": [{**tensor, "data": shortest(images)}]},
        "answers.json": answers,
    }.items():
        write_text(folder / file, json.dumps(content, allow_nan=False) + "\n")


def shortest(array: npt.NDArray[np.float32]) -> list[float]:
    """Flatten an array to the shortest decimals that restore each float32."""
    return [float(str(number)) for number in array.ravel()]


def write_readme(target: str, proven: Proven, folder: Path, **values: object) -> None:
    """Write ``README.md``: what the folder is, and the commands.

    Args:
        target: the package's.
        proven: the models.
        folder: the package.
        values: what this target's text mentions besides.
    """
    labels = [int(label) for label in proven.split.labels[:IMAGES]]
    text = fill(
        f"{target}.md.j2",
        models=proven.models,
        name=proven.models[0].name,
        labels=labels,
        onnxruntime=proven.versions["onnxruntime"],
        **values,
    )
    write_text(folder / "README.md", text)
