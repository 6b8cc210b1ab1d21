"""Stage verify: no ONNX file leaves the pipeline that does not compute what training left."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from mnist_batchnorm.artifacts.splits import Split, load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest, write_json, write_text
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, MODELS, PARITY, REPORTS, TEST_SPLIT
from mnist_batchnorm.network.model import load_checkpoint, load_variant
from mnist_batchnorm.network.onnx import INPUT, OUTPUT, provenance
from mnist_batchnorm.parity import Gate, ParityReport, runtime

ERRORS = REPORTS / "parity/errors.csv"


def verify(
    graphs: Sequence[Path], checkpoints: Mapping[str, Path], data: Path, opset: int
) -> tuple[dict[str, Any], dict[str, ParityReport]]:
    """Run the gate on each ONNX file, on all images of a split.

    Args:
        graphs: the ONNX files; its name in `GRAPHS` says which network each must be, and whether
            folded.
        checkpoints: of both networks, by variant.
        data: the split.
        opset: of ONNX's own operators, as exported.

    Returns:
        The content of ``reports/parity.json``, which docs/parity.md describes, and the report on
        each file by its name.

    Raises:
        UserError: A file is missing, or a checkpoint is not what its name says.
    """
    if missing := [path.as_posix() for path in graphs if not path.is_file()]:
        raise UserError(f"no {', '.join(missing)}; run `dvc repro export` first")
    split = load_split(data)
    origins = {
        variant: provenance(weights, load_variant(variant, weights))
        for variant, weights in checkpoints.items()
    }
    gates = {variant: gate_of(weights, split) for variant, weights in checkpoints.items()}
    reports = {}
    for path in graphs:
        expected = GRAPHS[path.name]
        reports[path.name] = gates[expected.variant].check(
            path,
            input_name=INPUT,
            output_name=OUTPUT,
            opset=opset,
            folded=expected.folded,
            provenance=origins[expected.variant],
            require_provenance=True,
        )
    content = {
        "schema": 1,
        "parity": all(report.parity for report in reports.values()),
        "data": {"path": data.as_posix(), "sha256": digest(data), "images": len(split)},
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "torch")},
        "goldens": goldens_of(split, [path for path in graphs if reports[path.name].parity]),
        "graphs": {name: report.to_json() for name, report in reports.items()},
    }
    return content, reports


def goldens_of(split: Split, graphs: Sequence[Path]) -> dict[str, Any]:
    """Compute what a server tries a file on before it serves it.

    Args:
        split: its first image of each digit is one.
        graphs: ONNX files that have passed.

    Returns:
        The images, uint8 ``[n, 784]`` in Base64, their labels, and each file's logits, float32
        ``[n, 10]``, as the shortest decimals that restore them.
    """
    _, first = np.unique(split.labels, return_index=True)
    images = split.images[first]
    logits = {
        path.name: runtime.load(path.read_bytes()).run(network_input(images)) for path in graphs
    }
    return {
        "images": base64.b64encode(images.tobytes()).decode(),
        "labels": split.labels[first].tolist(),
        "logits": {
            name: [[float(str(value)) for value in row] for row in rows]
            for name, rows in logits.items()
        },
    }


def gate_of(weights: Path, split: Split | None) -> Gate:
    """Make the gate for a checkpoint of this project, with real images where there are some."""
    if split is None:
        return Gate(weights)
    return Gate(weights, inputs=network_input(split.images), labels=split.labels)


def error_table(reports: Mapping[str, ParityReport], images: int) -> str:
    """Return the CSV of each image's largest relative error in each file.

    One row an image of the split, in its order; empty where no pass measured the file.
    """
    rows = [",".join(["image", *reports])]
    for image in range(images):
        errors = (report.errors for report in reports.values())
        rows.append(
            ",".join([str(image), *("" if e is None else f"{e[image]:.3e}" for e in errors)])
        )
    return "\n".join(rows) + "\n"


@click.command()
@click.option("--onnx", type=click.Path(path_type=Path), help="An ONNX file to judge.")
@click.option("--weights", type=click.Path(path_type=Path), help="The checkpoint it should be.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(onnx: Path | None, weights: Path | None, as_json: bool) -> None:
    """Prove that ONNX Runtime computes what PyTorch computes.

    Without options, the stage: judges models/bn.onnx, bn-folded.onnx and plain.onnx, writes
    reports/parity.json and reports/parity/. With --onnx and --weights, judges those two files and
    writes nothing. Exit status: 0 parity, 1 no parity, 2 cannot be judged.
    """
    if onnx is not None and weights is not None:
        _judge(onnx, weights, as_json)
    elif onnx is None and weights is None and not as_json:
        _stage()
    else:
        raise click.UsageError("--onnx and --weights go together, and --json needs both")


def _stage() -> None:
    from mnist_batchnorm.core.params import load_params

    graphs = [MODELS / name for name in GRAPHS]
    content, reports = verify(graphs, CHECKPOINTS, TEST_SPLIT, load_params().export.opset)
    write_json(PARITY, content)
    write_text(ERRORS, error_table(reports, content["data"]["images"]))
    for report in reports.values():
        click.echo(report.table())
    failed: dict[str, list[str]] = {}
    for report in reports.values():
        if not report.parity:
            failed.setdefault(report.weights, []).append(report.onnx)
    if failed:
        found = [
            f"{', '.join(files)} does not compute what {weights} computes"
            for weights, files in failed.items()
        ]
        raise CheckFailedError(f"{'; '.join(found)}; every check with its evidence is in {PARITY}")


def _judge(onnx: Path, weights: Path, as_json: bool) -> None:
    split = load_split(TEST_SPLIT) if TEST_SPLIT.is_file() else None
    if split is None:
        click.echo(f"no {TEST_SPLIT} here: judged by synthetic inputs alone", err=True)
    gate = gate_of(weights, split)
    expected = provenance(weights, load_checkpoint(weights))
    report = gate.check(onnx, input_name=INPUT, output_name=OUTPUT, provenance=expected)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.table())
    if report.verdict == "no parity":
        raise CheckFailedError(f"{onnx} does not compute what {weights} computes")
    if report.verdict == "unproven":
        raise UserError(f"{onnx} cannot be judged: not every check could be run")
