"""TODO."""

from pathlib import Path

import click

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.package.folder import replacing_folder, require_replaceable
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.package.write import TARGETS, write

CANARY = 10  # percent


@click.command()
@click.argument("target", type=click.Choice(TARGETS))
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--force", is_flag=True, help="Replace a package that DIR holds.")
@click.option("--image", metavar="REFERENCE", help="kserve: what to call the container image.")
@click.option(
    "--canary",
    type=click.IntRange(0, 100),
    metavar="PERCENT",
    help=f"kserve: requests that a new revision gets at first ({CANARY}).",
)
def command(
    target: str, directory: Path, force: bool, image: str | None, canary: int | None
) -> None:
    """Write what an engine needs to serve the models into DIR.

    triton: a model repository. kserve: an InferenceService of `mnist-bn serve` and its image's
    build context. mlflow: folders for `mlflow models serve` and MLServer. DIR must be absent or
    empty; its README.md says the commands. Exit status: 0 written, 1 a model is not proven, 2
    nothing to package or no place for it.
    """
    if target != "kserve" and (image is not None or canary is not None):
        raise UserError(f"--image and --canary are for kserve, not for {target}")
    require_replaceable(directory, force=force)
    proven = read_proven()
    with replacing_folder(directory, force=force) as folder:
        write(target, proven, folder, image=image, canary=CANARY if canary is None else canary)
        proven.require_unchanged()
    models = ", ".join(f"{model.name} {model.version}" for model in proven.models)
    click.echo(f"{directory}: {models} for {target}; {directory / 'README.md'} says how to start")
