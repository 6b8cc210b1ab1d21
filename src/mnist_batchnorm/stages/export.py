"""Stage export: the trained networks to ONNX, in eval mode.

Two graphs of the batch-norm network: ``bn.onnx`` keeps its BatchNormalization nodes, so that the
frozen statistics are readable in the file; ``bn-folded.onnx`` has them folded into the Gemm before.
``plain.onnx`` is the network without batch norm, for comparison.
"""

from pathlib import Path

import click
import onnx

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_bytes
from mnist_batchnorm.core.paths import CHECKPOINTS, GRAPHS, MODELS
from mnist_batchnorm.network.model import load_variant
from mnist_batchnorm.network.onnx import embed_provenance, export_onnx


def export(variant: str, weights: Path, opset: int) -> dict[str, bytes]:
    """Export one of the two networks: the bytes of each of its files in `GRAPHS`.

    The same checkpoint gives the same bytes.

    Raises:
        UserError: The checkpoint is unreadable, lacks its provenance, or holds the other network.
        CheckFailedError: The network fails `require_frozen`.
    """
    checkpoint = load_variant(variant, weights)
    if missing := {"train_sha256", "params"} - checkpoint.provenance.keys():
        raise UserError(
            f"{weights} does not say what made it: {', '.join(sorted(missing))} missing"
        )
    graphs = export_onnx(checkpoint.model(), checkpoint.architecture.widths[:1], opset)
    files = {}
    for name, exported in GRAPHS.items():
        if exported.variant != variant:
            continue
        proto = graphs[exported.folded]
        embed_provenance(proto, checkpoint)
        onnx.checker.check_model(proto, full_check=True)
        files[name] = proto.SerializeToString(deterministic=True)
    return files


@click.command()
def command() -> None:
    """Export both networks to ONNX in eval mode (models/bn.onnx, bn-folded.onnx, plain.onnx)."""
    from mnist_batchnorm.core.params import load_params

    opset = load_params().export.opset
    files: dict[str, bytes] = {}
    for variant, weights in CHECKPOINTS.items():  # in one process: most of the time is start-up
        files |= export(variant, weights, opset)
    for name, content in files.items():
        write_bytes(MODELS / name, content)
        click.echo(f"{MODELS / name}: {len(content):,} bytes")
