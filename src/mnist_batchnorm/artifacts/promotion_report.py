"""The decision about the present files, ``reports/promotion.json``; see docs/promotion.md."""

from mnist_batchnorm.artifacts.registry_file import Version
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.core.paths import PROMOTION


def write_promotion(version: Version) -> None:
    """Write a version's files and the last decision about it."""
    content = version.model_dump(mode="json", exclude={"errors", "decision"})
    report = {
        "schema": 1,
        "version": content.pop("version"),
        **version.decision.model_dump(mode="json"),
        **content,
    }
    write_json(PROMOTION, report)
