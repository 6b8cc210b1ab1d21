"""TODO."""

from mnist_batchnorm.artifacts.registry_file import Hashes, Measured
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED, TEST_SPLIT
from mnist_batchnorm.parity.runtime import BATCH_SIZE
from mnist_batchnorm.promotion.graph import Graph, load_graph


def measure() -> tuple[Measured, list[Graph]]:
    """Run both ONNX files on the test images.

    Returns:
        Which images each gets wrong, and the files themselves, loaded.

    Raises:
        UserError: A file is missing or unreadable.
        CheckFailedError: An ONNX file gives no logits.
    """
    test = load_split(TEST_SPLIT)
    inputs = network_input(test.images)
    if not CHECKPOINT.is_file():
        raise UserError(f"no {CHECKPOINT}; run `dvc repro train` first")
    graphs = {name: load_graph(MODELS / file) for name, file in REGISTERED.items()}
    wrong = {
        name: graph.logits(inputs, BATCH_SIZE).argmax(axis=1) != test.labels
        for name, graph in graphs.items()
    }
    measured = Measured(
        weights_sha256=digest(CHECKPOINT),
        test_sha256=digest(TEST_SPLIT),
        test_images=len(test),
        files={
            name: Hashes(sha256=graph.sha256, md5=digest(graph.path, "md5"))
            for name, graph in graphs.items()
        },
        errors={name: tuple(sorted(test.index[where].tolist())) for name, where in wrong.items()},
    )
    return measured, list(graphs.values())
