"""The README of a package, and an example request with the expected answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.core.files import write_text
from mnist_batchnorm.package.proven import Proven
from mnist_batchnorm.package.templating import fill
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT

IMAGES = 3  # in the example request


def write_examples(proven: Proven, folder: Path) -> None:
    """Write ``request.json`` (Open Inference Protocol) and ONNX Runtime's ``answers.json``."""
    images = proven.images[:IMAGES]
    request = {"inputs": [tensor(INPUT, images)]}
    answers = {model.name: tensor(OUTPUT, model.session.run(images)) for model in proven.models}
    for file, content in {"request.json": request, "answers.json": answers}.items():
        write_text(folder / file, json.dumps(content, allow_nan=False) + "\n")


def tensor(name: str, array: npt.NDArray[np.float32]) -> dict[str, Any]:
    # the shortest decimals that restore each float32
    data = [float(str(number)) for number in array.ravel()]
    return {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": data}


def write_readme(target: str, proven: Proven, folder: Path, **values: object) -> None:
    """Write ``README.md`` from the target's template; `values` are its further variables."""
    text = fill(
        f"{target}.md.j2",
        models=proven.models,
        name=proven.models[0].name,
        labels=proven.split.labels[:IMAGES].tolist(),
        onnxruntime=proven.versions["onnxruntime"],
        **values,
    )
    write_text(folder / "README.md", text)
