"""Tool package: write the proven models for other inference engines."""

from pathlib import Path

import click

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.package.folder import replacing_folder, require_replaceable
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.package.write import TARGETS, write

DEFAULT_CANARY_PERCENT = 10


@click.command()
@click.argument("target", type=click.Choice(TARGETS))
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--force", is_flag=True, help="Replace a package that DIR holds.")
@click.option("--image", metavar="REFERENCE", help="kserve: reference of the container image.")
@click.option(
    "--canary",
    type=click.IntRange(0, 100),
    metavar="PERCENT",
    help=f"kserve: share of requests for a new revision ({DEFAULT_CANARY_PERCENT}).",
)
def command(
    target: str, directory: Path, force: bool, image: str | None, canary: int | None
) -> None:
    """Write the files that an inference engine needs to serve the models into DIR.

    triton: a model repository. kserve: an InferenceService of `mnist-bn serve` and its image's
    build context. mlflow: folders for `mlflow models serve` and MLServer. DIR must be absent or
    empty; its README.md has the commands. Exit status: 0 written, 1 a model is not proven, 2
    a model is missing or DIR cannot be used.
    """
    if target != "kserve" and (image is not None or canary is not None):
        raise UserError(f"--image and --canary are for kserve, not for {target}")
    require_replaceable(directory, force=force)
    proven = read_proven()
    percent = DEFAULT_CANARY_PERCENT if canary is None else canary
    with replacing_folder(directory, force=force) as folder:
        write(target, proven, folder, image=image, canary=percent)
        proven.require_unchanged()
    models = ", ".join(f"{model.name} {model.version}" for model in proven.models)
    click.echo(f"{directory}: {models} for {target}; {directory / 'README.md'} says how to start")
