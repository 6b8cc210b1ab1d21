"""TODO."""

from mnist_batchnorm.artifacts.registry_file import Version


def promotion(version: Version) -> dict[str, object]:
    """Return the content of ``reports/promotion.json``, which docs/promotion.md describes."""
    content = version.model_dump(mode="json", exclude={"errors", "decision"})
    return {
        "schema": 1,
        "version": content.pop("version"),
        **version.decision.model_dump(mode="json"),
        **content,
    }
