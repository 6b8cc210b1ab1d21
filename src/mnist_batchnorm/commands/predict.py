"""Tool predict: which digit a picture shows, by proven models here or by a server."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import SIDE, network_input
from mnist_batchnorm.client.http import Answers, Model, Pixels, Server
from mnist_batchnorm.core.access import TOKEN, read_token
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS, PARITY, SERVED

if TYPE_CHECKING:
    from mnist_batchnorm.client.normalize import Digit

DEFAULT = "mnist-bn"
FILES = {name: MODELS / file for name, file in SERVED.items()}

AT_ONCE = 100  # pictures in one pass or request


@dataclass(frozen=True)
class Prediction:
    """What a model makes of one picture.

    Attributes:
        model: its name.
        version: likewise.
        digit: the likeliest.
        second: the next.
        probabilities: of the ten digits, softmax of the logits.
    """

    model: str
    version: str
    digit: int
    second: int
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        """Say it in a few words."""
        first, then = (percent(self.probabilities[digit]) for digit in (self.digit, self.second))
        return f"{self.digit}  {first}, then {self.second}  {then}"


def percent(probability: float) -> str:
    """Write a probability for people; never 0 % or 100 %, which no network says."""
    if probability < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if probability > 0.999 else f"{probability:.1%}".replace("%", " %")


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return probabilities for logits, ``[..., 10]``."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


# --- who answers --------------------------------------------------------------------------------


def here(name: str, onnx: Path) -> Model:
    """Return a model that ONNX Runtime runs in this process.

    Raises:
        UserError: The file is missing or is no such model.
        CheckFailedError: The parity gate has not proven it.
    """
    from mnist_batchnorm.serve.core import models

    model = models.load(name, onnx, PARITY, allow_unverified=True)
    if model.unproven:
        raise CheckFailedError(
            f"{onnx} is not asked: {model.unproven}; `dvc repro verify` proves it, or says why not"
        )

    def answer(pixels: Pixels) -> Answers:
        return Answers(model.version, model.run(network_input(pixels)))

    return answer


# --- what is asked ------------------------------------------------------------------------------


def predict(pixels: Pixels, models: Mapping[str, Model]) -> list[list[Prediction]]:
    """Ask models about pictures.

    Args:
        pixels: uint8 ``[n, 28, 28]``, 0 = background.
        models: by name.

    Returns:
        For each picture what each model makes of it.

    Raises:
        UserError: A server does not answer or refuses.
    """
    of_models = []
    for name, model in models.items():
        answers = model(pixels)
        of_one = []
        for row in softmax(answers.logits.astype(np.float64)):
            first, second = np.argsort(-row, kind="stable")[:2]
            told = tuple(float(probability) for probability in row)
            of_one.append(Prediction(name, answers.version, int(first), int(second), told))
        of_models.append(of_one)
    return [list(of_picture) for of_picture in zip(*of_models, strict=True)]


def read_file(file: str) -> "Digit":
    """Read a picture; ``-`` is standard input.

    Raises:
        UserError: It is missing or no picture that can be read.
    """
    from mnist_batchnorm.client.normalize import MAX_BYTES, read

    if file == "-":
        return read(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")
    try:
        with Path(file).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; check the name") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    return read(content, file)


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    Attributes:
        file: as it was named.
        done: what was done to the picture.
        predictions: one of each model.
        error: why there are none.
    """

    file: str
    done: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


def outcomes(files: Sequence[str], models: Mapping[str, Model]) -> Iterator[Outcome]:
    """Read files and ask models about them, some at a time, in order.

    Raises:
        UserError: A server does not answer or refuses.
    """
    for start in range(0, len(files), AT_ONCE):
        read: list[tuple[str, Digit | str]] = []
        for file in files[start : start + AT_ONCE]:
            try:
                read.append((file, read_file(file)))
            except UserError as error:
                read.append((file, str(error)))
        shown = [digit.pixels for _, digit in read if not isinstance(digit, str)]
        pixels = np.stack(shown) if shown else np.zeros((0, SIDE, SIDE), np.uint8)
        answers = iter(predict(pixels, models) if shown else [])
        for file, digit in read:
            if isinstance(digit, str):
                yield Outcome(file, error=digit)
            else:
                yield Outcome(file, digit.done, tuple(next(answers)))


# --- the command --------------------------------------------------------------------------------


def _models(
    named: Sequence[str], url: str | None, token_file: Path | None, *, insecure: bool
) -> dict[str, Model]:
    """Return who is asked, by name.

    Raises:
        UserError: An option does not fit, or a file is missing or no model.
        CheckFailedError: A file is not proven.
    """
    wanted = {}
    for word in named or [DEFAULT]:
        name, given, file = word.partition("=")
        if not name or (given and not file):
            raise UserError(f"--model: got {word!r}, expected NAME or NAME=FILE")
        wanted[name] = Path(file) if given else None
    if url is None:
        if token_file is not None:
            raise UserError("--token-file is for a server: give --url too")
        if insecure:
            raise UserError("--insecure is for a server: give --url too")
        return {name: here(name, file or _default(name)) for name, file in wanted.items()}
    if files := [name for name, file in wanted.items() if file]:
        raise UserError(f"--model {files[0]}=…: a server has its own files; give the name alone")
    server = Server(url, read_token(token_file), insecure=insecure)
    return {name: server.model(name) for name in wanted}


def _default(name: str) -> Path:
    if name not in FILES:
        raise UserError(f"--model {name}: which file is it? give {name}=FILE")
    return FILES[name]


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--url", metavar="URL", help="Ask the server there, in place of models/bn.onnx here.")
@click.option(
    "--model",
    "named",
    metavar="NAME[=FILE]",
    multiple=True,
    help=f"Ask this model, of this ONNX file; {DEFAULT} by default. Several are compared.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help=f"File of the token that the server wants; by default the variable {TOKEN}.",
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

    Reads PNG, JPEG, WebP, GIF and BMP, of any size, light on dark or dark on light, and says what
    was done to make it look like the images that the networks were trained on. Exit status: 0 all
    are answered, 1 the model is not proven, 2 a picture or the server cannot be used.
    """
    models = _models(named, url, token_file, insecure=insecure)
    told = []
    failures = 0
    for outcome in outcomes(files, models):
        failures += outcome.error is not None
        if as_json:
            told.append(_as_json(outcome))
        if outcome.error is not None:
            click.echo(f"error: {outcome.error}", err=True)
        elif not as_json:
            click.echo(_as_text(outcome))
    if as_json:
        click.echo(json.dumps({"files": told}, indent=2))
    if failures:
        raise UserError(f"{failures} of {len(files)} pictures not read")


def _as_text(outcome: Outcome) -> str:
    done = ", ".join(outcome.done) or "as it is"
    if len(outcome.predictions) == 1:
        return f"{outcome.file}: {outcome.predictions[0]}  ({done})"
    lines = [f"  {prediction.model}: {prediction}" for prediction in outcome.predictions]
    return "\n".join([f"{outcome.file}  ({done})", *lines])


def _as_json(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is not None:
        return {"file": outcome.file, "error": outcome.error}
    predictions = [asdict(prediction) for prediction in outcome.predictions]
    return {"file": outcome.file, "done": list(outcome.done), "predictions": predictions}
