"""Tool package: write what Triton, KServe or MLflow serve, from proven files only."""

from pathlib import Path

import click

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.package.folder import replacing_folder, require_replaceable, write_manifest
from mnist_batchnorm.package.proven import Proven, read_proven

TARGETS = ("triton", "kserve", "mlflow")
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


def write(target: str, proven: Proven, folder: Path, *, image: str | None, canary: int) -> None:
    """Fill a folder with a package and its manifest.

    Args:
        target: one of `TARGETS`.
        proven: the models.
        folder: an empty folder.
        image: of the container, where one is needed; by default named after the first model.
        canary: percentage of the requests that a new revision gets at first.

    Raises:
        UserError: Something that the package needs is missing or wrong.
        CheckFailedError: It would not be what the gate has passed.
    """
    from mnist_batchnorm.package import examples

    values: dict[str, object] = {}
    match target:
        case "triton":
            from mnist_batchnorm.package.triton import write_triton

            write_triton(proven, folder)
        case "kserve":
            from mnist_batchnorm.package.kserve import default_image, require_image, write_kserve

            image = require_image(default_image(proven) if image is None else image)
            write_kserve(proven, folder, image, canary)
            values["image"] = image
        case "mlflow":
            from mnist_batchnorm.package.mlflow_models import write_mlflow

            write_mlflow(proven, folder)
    examples.write_examples(proven, folder)
    examples.write_readme(target, proven, folder, **values)
    models = {
        model.name: {
            "file": model.path.as_posix(),
            "sha256": model.sha256,
            "version": model.version,
            "weights_sha256": model.weights_sha256,
        }
        for model in proven.models
    }
    write_manifest(folder, {"schema": 1, "target": target, "models": models})
