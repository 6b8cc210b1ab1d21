"""The models that the command line names: ONNX files, or versions in MLflow's registry."""

from collections.abc import Sequence
from pathlib import Path

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import MODELS, SERVED
from mnist_batchnorm.serve.core.catalog import FileSource, Source
from mnist_batchnorm.serve.registry.source import SCHEME, Address, RegisteredSource

NAMES = {file: name for name, file in SERVED.items()}


def parse_sources(
    words: Sequence[str], parity: Path, state: Path, *, allow_unverified: bool
) -> list[Source]:
    """Parse FILE, NAME=FILE, models:/MODEL@ALIAS and models:/MODEL/VERSION.

    Args:
        words: arguments of the command line; none: the pipeline's models.
        parity: the gate's report on the files.
        state: folder for downloads from MLflow's registry.
        allow_unverified: serve models that the gate has not passed.

    Raises:
        UserError: A registry address is invalid, or a model name does not fit into a URL or is not
            UTF-8.
    """
    sources: list[Source] = []
    for number, word in enumerate(words or [str(MODELS / file) for file in SERVED.values()]):
        name, location = "", word
        if "=" in word and not word.startswith(SCHEME):
            name, _, location = word.partition("=")
            if not name or "/" in name:
                raise UserError(
                    f"{word}: got {name!r} before =, expected the model's name, without /; a file "
                    "whose path has a = goes behind one, NAME=FILE"
                )
        if location.startswith(SCHEME):
            address = Address.parse(location)
            name = name or address.model
            folder = state / "registry" / str(number)
            sources.append(RegisteredSource(name, address, folder, allow_unverified))
        else:
            path = Path(location)
            name = name or NAMES.get(path.name, path.stem)
            sources.append(FileSource(name, path, parity, allow_unverified))
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word}: got the name {name!r}, expected one in UTF-8; NAME=FILE gives a "
                "file another"
            ) from None
    return sources
