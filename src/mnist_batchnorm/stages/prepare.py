"""Stage prepare: IDX files to train, valid and test splits, stratified and without overlap."""

from pathlib import Path

import click

from mnist_batchnorm.artifacts.data_summary import DATA_SUMMARY
from mnist_batchnorm.artifacts.splits import save_split
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import PrepareParams, load_params
from mnist_batchnorm.core.paths import PREPARED, RAW
from mnist_batchnorm.data.idx import read_pair
from mnist_batchnorm.data.split import split_training_images
from mnist_batchnorm.data.summary import summarize


def prepare(raw: Path, prepared: Path, summary: Path, params: PrepareParams) -> None:
    """Write ``train``, ``valid`` and ``test.safetensors`` and their summary."""
    splits = split_training_images(read_pair(raw, "train"), read_pair(raw, "t10k"), params)
    files = {name: prepared / f"{name}.safetensors" for name in splits}
    for name, split in splits.items():
        save_split(files[name], split)
    protocol = (
        f"valid: {params.valid_size} training images held out"
        if params.valid_size
        else "lecture: valid is the test images, so valid figures are not independent of test"
    )
    sha256 = {
        "raw": {path.name: digest(path) for path in sorted(raw.glob("*-ubyte"))},
        "prepared": {name: digest(path) for name, path in files.items()},
    }
    summarize(splits, protocol, sha256).write(summary)


@click.command()
def command() -> None:
    """Split the images into train, valid and test (data/prepared)."""
    params = load_params().prepare
    prepare(RAW, PREPARED, DATA_SUMMARY, params)
    if params.valid_size == 0:
        click.echo("valid_size is 0: the lecture's protocol, valid = the test images", err=True)
