"""Measure the present files on the test images."""

from mnist_batchnorm.artifacts.registry_file import Hashes, Measured
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED, TEST_SPLIT
from mnist_batchnorm.parity.runtime import BATCH_SIZE
from mnist_batchnorm.promotion.onnx_model import OnnxModel, load_onnx_model


def measure() -> tuple[Measured, list[OnnxModel]]:
    """Run both registered ONNX files on the test images; return the result and the loaded files.

    Raises:
        UserError: A file is missing or unreadable.
        CheckFailedError: An ONNX file does not give logits.
    """
    test = load_split(TEST_SPLIT)
    inputs = network_input(test.images)
    if not CHECKPOINT.is_file():
        raise UserError(f"no {CHECKPOINT}; run `dvc repro train` first")
    models = {name: load_onnx_model(MODELS / file) for name, file in REGISTERED.items()}
    errors = {}
    for name, model in models.items():
        wrong = model.logits(inputs, BATCH_SIZE).argmax(axis=1) != test.labels
        errors[name] = tuple(sorted(test.index[wrong].tolist()))
    measured = Measured(
        weights_sha256=digest(CHECKPOINT),
        test_sha256=digest(TEST_SPLIT),
        test_images=len(test),
        files={
            name: Hashes(sha256=model.sha256, md5=digest(model.path, "md5"))
            for name, model in models.items()
        },
        errors=errors,
    )
    return measured, list(models.values())
