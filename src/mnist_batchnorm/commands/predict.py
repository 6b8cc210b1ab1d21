"""Tool predict: classify pictures of digits with proven local models or through a server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.client.http import Client, Model, ModelOutput, Pixels
from mnist_batchnorm.commands.options import FILE
from mnist_batchnorm.core.access import TOKEN, read_token
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS, PARITY, SERVED

if TYPE_CHECKING:
    from mnist_batchnorm.client.normalize import Digit

DEFAULT = "mnist-bn"
FILES = {name: MODELS / file for name, file in SERVED.items()}

BATCH_SIZE = 100  # pictures in a forward pass or request


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one picture: the two most probable digits, and all probabilities."""

    model: str
    version: str
    digit: int
    second: int
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        first, then = (percent(self.probabilities[digit]) for digit in (self.digit, self.second))
        return f"{self.digit}  {first}, then {self.second}  {then}"


def percent(probability: float) -> str:
    # never 0 % or 100 %: no prediction is certain
    if probability < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if probability > 0.999 else f"{probability:.1%}".replace("%", " %")


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # not SciPy's, which the extras `client` and `serve` do not install; the values are equal
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def load_local(name: str, file: Path | None) -> Model:
    """Return a function that runs an ONNX file, by default the model's in `FILES`, here.

    Raises:
        UserError: The file is missing or is not such a model.
        CheckFailedError: The parity gate has not proven it.
    """
    from mnist_batchnorm.serve.core import models

    onnx = file or FILES.get(name)
    if onnx is None:
        raise UserError(f"--model {name}: which file is it? give {name}=FILE")
    model = models.load(name, onnx, PARITY, allow_unverified=True)
    if model.unproven:
        raise CheckFailedError(
            f"{onnx} is not asked: {model.unproven}; `dvc repro verify` proves it, or says why not"
        )
    return lambda pixels: ModelOutput(model.version, model.run(network_input(pixels)))


def predict(name: str, model: Model, pixels: Pixels) -> list[Prediction]:
    """Classify pictures, uint8 ``[n, 28, 28]``, with one model."""
    output = model(pixels)
    probabilities = softmax(output.logits.astype(np.float64))
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :2].tolist()
    return [
        Prediction(name, output.version, first, second, tuple(row))
        for (first, second), row in zip(best, probabilities.tolist(), strict=True)
    ]


def read_file(file: str) -> "Digit | UserError":
    """Read a picture, ``-`` from standard input; return why that failed otherwise."""
    from mnist_batchnorm.client.normalize import MAX_BYTES, read

    try:
        with click.open_file(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        return read(content, "standard input" if file == "-" else file)
    except UserError as error:
        return error
    except FileNotFoundError:
        return UserError(f"{file}: no such file; check the name")
    except OSError as error:
        return UserError(f"{file}: cannot be read: {error.strerror}")


def classify(
    files: Sequence[str], models: Mapping[str, Model]
) -> Iterator[tuple[str, "Digit | UserError", tuple[Prediction, ...]]]:
    """Read and classify files in batches; yield each with the predictions of all models in order.

    Raises:
        UserError: A server cannot be reached or returns an error.
    """
    for start in range(0, len(files), BATCH_SIZE):
        batch = [(file, read_file(file)) for file in files[start : start + BATCH_SIZE]]
        pixels = [digit.pixels for _, digit in batch if not isinstance(digit, UserError)]
        by_model = [predict(*item, np.stack(pixels)) for item in models.items() if pixels]
        predictions = zip(*by_model, strict=True)
        for file, digit in batch:
            yield file, digit, () if isinstance(digit, UserError) else next(predictions)


def _models(
    named: Sequence[str], url: str | None, token_file: Path | None, *, insecure: bool
) -> dict[str, Model]:
    files = {}
    for word in named or [DEFAULT]:
        name, given, file = word.partition("=")
        if not name or (given and not file):
            raise UserError(f"--model: got {word!r}, expected NAME or NAME=FILE")
        files[name] = Path(file) if given else None
    if url is None:
        for option, value in {"--token-file": token_file, "--insecure": insecure}.items():
            if value:
                raise UserError(f"{option} is for a server: give --url too")
        return {name: load_local(name, file) for name, file in files.items()}
    if local := [name for name, file in files.items() if file]:
        raise UserError(f"--model {local[0]}=…: a server has its own files; give the name alone")
    client = Client(url, read_token(token_file), insecure=insecure)
    return {name: partial(client.infer, name) for name in files}


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--url", metavar="URL", help="Use the server there instead of models/bn.onnx here.")
@click.option(
    "--model",
    "named",
    metavar="NAME[=FILE]",
    multiple=True,
    help=f"Use this model, from this ONNX file; {DEFAULT} by default. Several are compared.",
)
@click.option(
    "--token-file",
    type=FILE,
    help=f"File of the server's bearer token; by default the variable {TOKEN}.",
)
@click.option(
    "--insecure", is_flag=True, help="Send the token in clear, over http, to another machine."
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(
    files: tuple[str, ...],
    url: str | None,
    named: tuple[str, ...],
    token_file: Path | None,
    insecure: bool,
    as_json: bool,
) -> None:
    """Classify pictures of digits; FILE - is standard input.

    Reads PNG, JPEG, WebP, GIF and BMP, of any size, light on dark or dark on light, and reports
    how they were converted to the format of the training images. Exit status: 0 all are classified,
    1 the model is not proven, 2 a picture or the server cannot be used.
    """
    models = _models(named, url, token_file, insecure=insecure)
    results: list[dict[str, Any]] = []
    for file, digit, predictions in classify(files, models):
        if isinstance(digit, UserError):
            results.append({"file": file, "error": str(digit)})
            click.echo(f"error: {digit}", err=True)
            continue
        listed = [asdict(prediction) for prediction in predictions]
        results.append({"file": file, "done": digit.done, "predictions": listed})
        if not as_json:
            click.echo(_as_text(file, digit.done, predictions))
    if as_json:
        click.echo(json.dumps({"files": results}, indent=2))
    if failures := sum("error" in result for result in results):
        raise UserError(f"{failures} of {len(files)} pictures not read")


def _as_text(file: str, steps: Sequence[str], predictions: Sequence[Prediction]) -> str:
    done = ", ".join(steps) or "as it is"
    if len(predictions) == 1:
        return f"{file}: {predictions[0]}  ({done})"
    lines = [f"  {prediction.model}: {prediction}" for prediction in predictions]
    return "\n".join([f"{file}  ({done})", *lines])
