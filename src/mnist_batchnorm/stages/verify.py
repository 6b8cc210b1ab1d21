"""Stage verify: no ONNX file is released until ONNX Runtime gives PyTorch's eval-mode results."""

import json
from pathlib import Path

import click

from mnist_batchnorm.artifacts.parity_report import JudgedImages, goldens_of, write_parity
from mnist_batchnorm.artifacts.splits import Split, load_hashed_split, load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, MODELS, PARITY, TEST_SPLIT
from mnist_batchnorm.network.model import Checkpoint, load_checkpoint, load_variant
from mnist_batchnorm.network.onnx import INPUT, OUTPUT, provenance
from mnist_batchnorm.parity import Gate, ParityReport, runtime


def verify(opset: int) -> list[ParityReport]:
    """Judge every file in `GRAPHS` on all test images, and write the reports.

    Raises:
        UserError: A file is missing, or a checkpoint holds the other network.
    """
    graphs = {name: MODELS / name for name in GRAPHS}
    if missing := [path.as_posix() for path in graphs.values() if not path.is_file()]:
        raise UserError(f"no {', '.join(missing)}; run `dvc repro export` first")
    split, split_sha256 = load_hashed_split(TEST_SPLIT)
    checkpoints = {name: load_variant(name, weights) for name, weights in CHECKPOINTS.items()}
    gates = {name: gate_of(CHECKPOINTS[name], checkpoints[name], split) for name in CHECKPOINTS}
    contents = {name: path.read_bytes() for name, path in graphs.items()}
    reports = {
        name: gates[expected.variant].check(
            graphs[name],
            content=contents[name],
            input_name=INPUT,
            output_name=OUTPUT,
            opset=opset,
            folded=expected.folded,
            provenance=provenance(checkpoints[expected.variant]),
            require_provenance=True,
        )
        for name, expected in GRAPHS.items()
    }
    passed = [name for name, report in reports.items() if report.parity]
    goldens = goldens_of(split, {name: runtime.load(contents[name]).run for name in passed})
    data = JudgedImages(path=TEST_SPLIT.as_posix(), sha256=split_sha256, images=len(split))
    write_parity(reports, data, goldens)
    return list(reports.values())


def gate_of(weights: Path, checkpoint: Checkpoint, split: Split | None) -> Gate:
    """Return the gate for a checkpoint of this project, with real images if there are any."""
    if split is None:
        return Gate(weights, checkpoint=checkpoint)
    inputs = network_input(split.images)
    return Gate(weights, checkpoint=checkpoint, inputs=inputs, labels=split.labels)


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
        _run_stage()
    else:
        raise click.UsageError("--onnx and --weights go together, and --json needs both")


def _run_stage() -> None:
    from mnist_batchnorm.core.params import load_params

    failed: dict[str, list[str]] = {}
    for report in verify(load_params().export.opset):
        click.echo(report.table())
        if not report.parity:
            failed.setdefault(report.weights, []).append(report.onnx)
    if failed:
        found = [f"{', '.join(failed[w])} does not compute what {w} computes" for w in failed]
        raise CheckFailedError(f"{'; '.join(found)}; every check with its evidence is in {PARITY}")


def _judge(onnx: Path, weights: Path, as_json: bool) -> None:
    split = load_split(TEST_SPLIT) if TEST_SPLIT.is_file() else None
    if split is None:
        click.echo(f"no {TEST_SPLIT} here: judged by synthetic inputs alone", err=True)
    checkpoint = load_checkpoint(weights)
    report = gate_of(weights, checkpoint, split).check(
        onnx, input_name=INPUT, output_name=OUTPUT, provenance=provenance(checkpoint)
    )
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.table())
    if report.verdict == "no parity":
        raise CheckFailedError(f"{onnx} does not compute what {weights} computes")
    if report.verdict == "unproven":
        raise UserError(f"{onnx} cannot be judged: not every check could be run")
