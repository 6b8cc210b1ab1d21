"""TODO."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import MODELS, SERVED

if TYPE_CHECKING:
    from mnist_batchnorm.serve.core.catalog import Source

NAMES = {file: name for name, file in SERVED.items()}


def sources_of(
    words: Sequence[str], parity: Path, state: Path, *, allow_unverified: bool
) -> "Sequence[Source]":
    """Make sources of what stands in the command line.

    Args:
        words: of the command line.
        parity: the gate's report on the files among them.
        state: folder for what is fetched from MLflow's registry.
        allow_unverified: serve whatever the reports say.

    Raises:
        UserError: An address in MLflow's registry is none, or a model's name fits into no URL or is
            not UTF-8.
    """
    from mnist_batchnorm.serve.core.catalog import FileSource
    from mnist_batchnorm.serve.registry.source import SCHEME, Address, RegisteredSource

    files = list(words) or [str(MODELS / file) for file in SERVED.values()]
    sources: list[Source] = []
    for number, word in enumerate(files):
        name, equals, what = ("", "", word) if word.startswith(SCHEME) else word.partition("=")
        if equals and (not name or "/" in name):
            raise UserError(
                f"{word}: got {name!r} before =, expected the model's name, without /; a file "
                "whose path has a = goes behind one, NAME=FILE"
            )
        if what.startswith(SCHEME):
            address = Address.parse(what)
            folder = state / "registry" / str(number)
            source = RegisteredSource(name or address.model, address, folder, allow_unverified)
            sources.append(source)
            continue
        path = Path(what if equals else word)
        known = name if equals else NAMES.get(path.name, path.stem)
        sources.append(FileSource(known, path, parity, allow_unverified))
    for word, named in zip(files, sources, strict=True):
        try:
            named.name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word}: got the name {named.name!r}, expected one in UTF-8; NAME=FILE gives a "
                "file another"
            ) from None
    return sources
