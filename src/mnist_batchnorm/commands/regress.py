"""Command regress: compare the exported models' outputs with the pinned ones, or pin them anew."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mnist_batchnorm.artifacts.goldens import (
    GOLDEN_FILES,
    PinnedOutputs,
    read_golden_images,
    write_pinned_outputs,
)
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.paths import GRAPHS, MODELS
from mnist_batchnorm.promotion import goldens
from mnist_batchnorm.promotion.onnx_model import OnnxModel, load_onnx_model


def to_json(
    model: OnnxModel, path: Path, pinned: PinnedOutputs, comparison: goldens.Comparison
) -> dict[str, Any]:
    """Return what ``--json`` prints about one model; ``path`` is the file of the pinned outputs."""
    return {
        "same": comparison.same,
        "sha256": model.sha256,
        "golden_sha256": pinned.onnx_sha256.get(model.path.name),
        "weights_sha256": model.weights_sha256,
        "golden_weights_sha256": pinned.weights_sha256,
        "goldens": {
            "path": path.as_posix(),
            "computed_by": pinned.computed_by,
            "images": len(pinned.images),
        },
        **asdict(comparison),
    }


def describe(name: str, found: dict[str, Any]) -> str:
    """Describe the result of `to_json` on several lines."""
    count = found["goldens"]["images"]
    lines = [
        f"{MODELS / name}: {'same outputs' if found['same'] else 'OUTPUTS CHANGED'}",
        f"  made from    {_describe_weights(found)}",
        f"  logits       largest change {found['max_change']:.2g} of the row's largest logit, "
        f"median {found['median_change']:.2g}; {found['images_beyond']} of {count} images "
        f"beyond {goldens.TOLERANCE:g} (batch size {found['batch_size']})",
        f"  predictions  {len(found['flips'])} of {count} changed; right before "
        f"{found['right_before']}, now {found['right_after']}",
    ]
    lines += [
        "    image {index:>4}, a {label}: {before} -> {after}, "
        "margin {margin_before:.3g} -> {margin_after:.3g}".format(**flip)
        for flip in found["flips"]
    ]
    return "\n".join(lines)


def _describe_weights(found: dict[str, Any]) -> str:
    if found["sha256"] == found["golden_sha256"]:
        return f"the very file that was pinned ({found['sha256'][:12]})"
    before, now = found["golden_weights_sha256"], found["weights_sha256"]
    if before is None or now is None:
        return "weights that the file does not name"
    if before == now:
        return f"the pinned weights ({now[:12]}), but the file is another: exported anew"
    return f"other weights: pinned {before[:12]}, now {now[:12]}"


@click.command()
@click.option("--update", is_flag=True, help="Pin the present outputs as the golden ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(update: bool, as_json: bool) -> None:
    """Compare the outputs of models/bn.onnx, bn-folded.onnx and plain.onnx with the golden ones.

    Exit status: 0 the same but for rounding, 1 changed, 2 there is nothing to compare.
    """
    if update and as_json:
        raise click.UsageError("--update compares nothing, so there is no JSON to print.")
    split, images_sha256 = read_golden_images()
    networks = {
        path: [load_onnx_model(MODELS / name) for name in GRAPHS if GRAPHS[name].variant == variant]
        for variant, path in GOLDEN_FILES.items()
    }
    if update:
        pinned = {
            path: goldens.pin_outputs(models, split, images_sha256)
            for path, models in networks.items()
        }
        for path, models in networks.items():
            write_pinned_outputs(path, pinned[path])
            click.echo(f"{path}: pinned the outputs of {models[0].path} for {len(split)} images")
        return

    found = {}
    changed = []
    for path, models in networks.items():
        outputs, comparisons = goldens.compare_with_pinned(models, split, images_sha256, path)
        for model in models:
            name = model.path.name
            found[name] = to_json(model, path, outputs, comparisons[name])
        if names := [name for name, comparison in comparisons.items() if not comparison.same]:
            changed.append(f"{', '.join(names)}: outputs differ from {path}")
    if as_json:
        result = {"same": not changed, "tolerance": goldens.TOLERANCE, "graphs": found}
        click.echo(json.dumps(result, indent=2))
    else:
        for name, of_model in found.items():
            click.echo(describe(name, of_model))
    if changed:
        raise CheckFailedError(
            f"{'; '.join(changed)}; if that is meant, pin them with `mnist-bn regress --update`"
        )
