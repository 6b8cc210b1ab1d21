"""Write a package for one target."""

from pathlib import Path

from mnist_batchnorm.package.folder import write_manifest
from mnist_batchnorm.package.proven import Proven

TARGETS = ("triton", "kserve", "mlflow")


def write(target: str, proven: Proven, folder: Path, *, image: str | None, canary: int) -> None:
    """Write a package and its manifest into an empty folder.

    Args:
        target: one of `TARGETS`.
        proven: the models.
        folder: an empty folder.
        image: of kserve; by default named after the first model.
        canary: of kserve, percentage of requests for a new revision.

    Raises:
        UserError: An input is missing or invalid.
        CheckFailedError: The package would differ from what the gate has passed.
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
