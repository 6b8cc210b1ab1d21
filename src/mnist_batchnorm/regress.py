"""Tool regress: what changed in the exported model's outputs since somebody last pinned them.

Two trainings of the same accuracy can disagree on many images; logits of fixed images show it. The
goldens lie in git beside the images they belong to. They are no output of the pipeline: only
``mnist-bn regress --update`` writes them, and ``git diff`` then shows what was accepted.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import click
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mnist_batchnorm.dataset import CLASSES, Split, load_split, network_input
from mnist_batchnorm.errors import CheckFailedError, UserError
from mnist_batchnorm.files import digest, write_text
from mnist_batchnorm.layout import GRAPHS, MODELS, WEIGHTS_KEY
from mnist_batchnorm.parity import runtime

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

FIXTURES = Path("tests/regression")
IMAGES = FIXTURES / "images.safetensors"
GOLDENS = FIXTURES / "pipeline-goldens.json"  # of the network that is registered
PINNED = {"bn": GOLDENS, "plain": FIXTURES / "plain-goldens.json"}  # by variant

BATCH_SIZES = (64, 32, 7, 2, 1)  # images a call

# Largest change of a logit over the row's largest logit that is still rounding: honest graphs were
# measured within 1.6e-6 of float64 arithmetic on the fixture's images, the plain network the
# furthest, so two of them lie within 3.2e-6 of each other.
TOLERANCE = 1e-5

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FLOAT32_MAX = float(str(np.finfo(np.float32).max))  # as the goldens write it
Logit = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]


class GoldenImage(BaseModel):
    """One image's golden logits, with what a reader of the file needs to find the image."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int
    label: int
    logits: Annotated[tuple[Logit, ...], Field(min_length=CLASSES, max_length=CLASSES)]


class Goldens(BaseModel):
    """Golden logits and what they were computed from.

    Attributes:
        computed_by: the arithmetic behind the logits, for people.
        weights_sha256: of the checkpoint; None when the ONNX file does not say.
        onnx_sha256: of each ONNX file that was pinned.
        images_sha256: of the fixture.
        images: in the fixture's order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    computed_by: str
    weights_sha256: Sha256 | None
    onnx_sha256: dict[str, Sha256]
    images_sha256: Sha256
    images: tuple[GoldenImage, ...]

    @property
    def logits(self) -> Float32:
        """The golden logits, float32 ``[n, 10]``."""
        return np.array([image.logits for image in self.images], dtype=np.float32)


def golden_images(split: Split, logits: Float32) -> tuple[GoldenImage, ...]:
    """Pair each image with its logits, as the shortest decimals that restore the float32."""
    return tuple(
        GoldenImage(index=int(index), label=int(label), logits=tuple(float(str(x)) for x in row))
        for index, label, row in zip(split.index, split.labels, logits, strict=True)
    )


def save_goldens(path: Path, goldens: Goldens) -> None:
    """Write goldens as JSON, one image a line, so that a diff shows which images changed.

    Raises:
        UserError: The file cannot be written; what was there before still is.
    """
    head = json.dumps(goldens.model_dump(exclude={"images"}), indent=2).removesuffix("\n}")
    rows = ",\n".join(f"    {json.dumps(image.model_dump())}" for image in goldens.images)
    try:
        write_text(path, f'{head},\n  "images": [\n{rows}\n  ]\n}}\n')
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load_goldens(path: Path, split: Split, images_sha256: str) -> Goldens:
    """Read the goldens of a fixture.

    Raises:
        UserError: The file is missing or unreadable, holds no goldens, or those of other images.
    """
    try:
        goldens = Goldens.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no {path}: no outputs have been pinned yet; `mnist-bn regress --update` pins "
            "those of the present models"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise UserError(
            f"{path} holds no goldens: {where}: {problem['msg']}; restore it with git, or pin the "
            "present outputs with `mnist-bn regress --update`"
        ) from None
    if goldens.images_sha256 != images_sha256 or [image.index for image in goldens.images] != list(
        split.index
    ):
        raise UserError(
            f"{path} belongs to other images than the fixture's; restore both with git, or pin "
            "the present outputs with `mnist-bn regress --update`"
        )
    return goldens


@dataclass(frozen=True)
class Graph:
    """An ONNX file in memory, ready to run.

    Attributes:
        sha256: of the file.
        session: from float32 ``[batch, 784]`` to the file's own output.
    """

    path: Path
    sha256: str
    session: runtime.Session

    @property
    def weights_sha256(self) -> str | None:
        """Of the checkpoint that the file says it was made from, if it does."""
        return self.session.metadata.get(WEIGHTS_KEY)

    def logits(self, inputs: Float32, batch_size: int) -> Float32:
        """Run all inputs, ``batch_size`` at a time; float32 ``[n, 10]``.

        Raises:
            CheckFailedError: It cannot, or its outputs are not finite logits of that shape.
        """
        try:
            logits = self.session.run_in_batches(inputs, batch_size)
        except runtime.RuntimeFailedError as error:
            raise CheckFailedError(
                f"{self.path} does not run at batch size {batch_size}: {error}"
            ) from None
        if logits.shape != (len(inputs), CLASSES) or logits.dtype != np.float32:
            raise CheckFailedError(
                f"{self.path} gives {logits.dtype} {logits.shape} at batch size {batch_size}, "
                f"expected float32 {(len(inputs), CLASSES)}"
            )
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            raise CheckFailedError(
                f"{self.path} gives NaN or infinite logits for {bad.sum()} of {len(inputs)} "
                f"images at batch size {batch_size}"
            )
        return logits


def load_graph(path: Path) -> Graph:
    """Load an ONNX file into ONNX Runtime, on the CPU.

    Raises:
        UserError: The file is missing, unreadable or not an ONNX model.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro export` first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        session = runtime.load(content)
    except runtime.RuntimeFailedError as error:
        raise UserError(
            f"{path} is not an ONNX model that runs: {error}; `dvc repro export` makes it again"
        ) from None
    return Graph(path, sha256(content).hexdigest(), session)


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class changed.

    Attributes:
        index: position in MNIST's test file.
        label: the digit that it is.
        before: class that the goldens predict.
        after: class that the graph predicts.
        margin_before: the golden largest logit minus the second largest.
        margin_after: the same of the graph's.
    """

    index: int
    label: int
    before: int
    after: int
    margin_before: float
    margin_after: float


@dataclass(frozen=True)
class Comparison:
    """How logits differ from the golden ones; changes are relative to the row's largest logit.

    Attributes:
        batch_size: at which the logits were computed.
        max_change: over all images.
        median_change: over all images.
        images_beyond: images that changed by more than `TOLERANCE`.
        right_before: images that the goldens classify rightly.
        right_after: images that the graph classifies rightly.
        flips: images whose predicted class changed.
    """

    batch_size: int
    max_change: float
    median_change: float
    images_beyond: int
    right_before: int
    right_after: int
    flips: tuple[Flip, ...]

    @property
    def same(self) -> bool:
        """Whether only rounding tells the two apart."""
        return not self.images_beyond and not self.flips


def relative_change(golden: Float32, logits: Float32) -> Float64:
    """Return each row's largest change over the row's largest golden logit, ``[n]``.

    Not each logit's own relative change: near zero that is large for any honest runtime.
    """
    exact = golden.astype(np.float64)
    size = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny)
    change: Float64 = np.abs(logits - exact).max(axis=1) / size
    return change


def margins(logits: Float32) -> Float64:
    """Return how far the largest logit of each row is above the second, ``[n]``."""
    second, first = np.sort(logits.astype(np.float64), axis=1)[:, -2:].T
    difference: Float64 = first - second
    return difference


def compare(golden: Float32, logits: Float32, split: Split, batch_size: int) -> Comparison:
    """Compare a graph's logits of the fixture with the golden ones.

    Args:
        golden: float32 ``[n, 10]``.
        logits: float32 ``[n, 10]``, finite.
        split: the n images.
        batch_size: at which ``logits`` were computed.
    """
    change = relative_change(golden, logits)
    before, after = golden.argmax(axis=1), logits.argmax(axis=1)
    margin_before, margin_after = margins(golden), margins(logits)
    return Comparison(
        batch_size=batch_size,
        max_change=float(change.max()),
        median_change=float(np.median(change)),
        images_beyond=int((change > TOLERANCE).sum()),
        right_before=int((before == split.labels).sum()),
        right_after=int((after == split.labels).sum()),
        flips=tuple(
            Flip(
                int(split.index[i]),
                int(split.labels[i]),
                int(before[i]),
                int(after[i]),
                float(margin_before[i]),
                float(margin_after[i]),
            )
            for i in np.flatnonzero(before != after)
        ),
    )


def regress(graph: Graph, goldens: Goldens, split: Split) -> Comparison:
    """Run a graph on the fixture at every batch size and return the worst comparison.

    Raises:
        CheckFailedError: The graph cannot run on the fixture.
    """
    inputs = network_input(split.images)
    golden = goldens.logits
    comparisons = [
        compare(golden, graph.logits(inputs, batch_size), split, batch_size)
        for batch_size in BATCH_SIZES
    ]
    return max(comparisons, key=lambda c: (len(c.flips), c.max_change))


def load_fixture() -> tuple[Split, str]:
    """Read the images of the fixture, and the SHA-256 of their file.

    Raises:
        UserError: The file is missing or does not hold images.
    """
    if not IMAGES.exists():
        raise UserError(f"no {IMAGES} in {Path.cwd()}; run this in the folder that holds dvc.yaml")
    return load_split(IMAGES), digest(IMAGES)


def compare_with_goldens(
    graphs: Sequence[Graph], split: Split, images_sha256: str, path: Path = GOLDENS
) -> tuple[Goldens, dict[str, Comparison]]:
    """Compare each graph of one network with the goldens that are pinned in a file.

    Returns:
        The goldens, and the worst comparison of each graph by its file's name.

    Raises:
        UserError: The goldens are missing, unreadable or of other images.
        CheckFailedError: A graph cannot run on the fixture.
    """
    goldens = load_goldens(path, split, images_sha256)
    return goldens, {graph.path.name: regress(graph, goldens, split) for graph in graphs}


def pin(graphs: Sequence[Graph], split: Split, images_sha256: str) -> Goldens:
    """Make the outputs of the first graph of a network the goldens of all.

    Raises:
        CheckFailedError: A graph does not agree with the first at every batch size.
    """
    first = graphs[0]
    goldens = Goldens(
        computed_by=f"ONNX Runtime {version('onnxruntime')} from {first.path.as_posix()}",
        weights_sha256=first.weights_sha256,
        onnx_sha256={graph.path.name: graph.sha256 for graph in graphs},
        images_sha256=images_sha256,
        images=golden_images(split, first.logits(network_input(split.images), len(split))),
    )
    for graph in graphs:
        comparison = regress(graph, goldens, split)
        if not comparison.same:
            raise CheckFailedError(
                f"nothing pinned: at batch size {comparison.batch_size} {graph.path} differs from "
                f"{first.path} at batch size {len(split)} by {comparison.max_change:.2g} of the "
                f"row's largest logit (limit {TOLERANCE:g}); run `dvc repro verify`"
            )
    return goldens


@dataclass(frozen=True)
class Finding:
    """What came of one graph.

    Attributes:
        graph: the file.
        path: of its network's goldens.
        goldens: what they hold.
        comparison: of the two.
    """

    graph: Graph
    path: Path
    goldens: Goldens
    comparison: Comparison


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the result as ``--json`` prints it."""
    return {
        "same": all(finding.comparison.same for finding in findings),
        "tolerance": TOLERANCE,
        "graphs": {
            finding.graph.path.name: {
                "same": finding.comparison.same,
                "sha256": finding.graph.sha256,
                "golden_sha256": finding.goldens.onnx_sha256.get(finding.graph.path.name),
                "weights_sha256": finding.graph.weights_sha256,
                "golden_weights_sha256": finding.goldens.weights_sha256,
                "goldens": {
                    "path": finding.path.as_posix(),
                    "computed_by": finding.goldens.computed_by,
                    "images": len(finding.goldens.images),
                },
                **asdict(finding.comparison),
            }
            for finding in findings
        },
    }


def describe(finding: Finding) -> str:
    """Say for people what changed in one graph's outputs, a few lines."""
    graph, goldens, comparison = finding.graph, finding.goldens, finding.comparison
    count = len(goldens.images)
    lines = [
        f"{graph.path}: {'same outputs' if comparison.same else 'OUTPUTS CHANGED'}",
        f"  made from    {_describe_origin(graph, goldens)}",
        f"  logits       largest change {comparison.max_change:.2g} of the row's largest logit, "
        f"median {comparison.median_change:.2g}; {comparison.images_beyond} of {count} images "
        f"beyond {TOLERANCE:g} (batch size {comparison.batch_size})",
        f"  predictions  {len(comparison.flips)} of {count} changed; right before "
        f"{comparison.right_before}, now {comparison.right_after}",
    ]
    lines += [
        f"    image {flip.index:>4}, a {flip.label}: {flip.before} -> {flip.after}, "
        f"margin {flip.margin_before:.3g} -> {flip.margin_after:.3g}"
        for flip in comparison.flips
    ]
    return "\n".join(lines)


def _describe_origin(graph: Graph, goldens: Goldens) -> str:
    if graph.sha256 == goldens.onnx_sha256.get(graph.path.name):
        return f"the very file that was pinned ({graph.sha256[:12]})"
    before, now = goldens.weights_sha256, graph.weights_sha256
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
    split, images_sha256 = load_fixture()
    networks = {
        path: [load_graph(MODELS / name) for name, of in GRAPHS.items() if of.variant == variant]
        for variant, path in PINNED.items()
    }
    if update:
        pinned = {path: pin(graphs, split, images_sha256) for path, graphs in networks.items()}
        for path, graphs in networks.items():
            save_goldens(path, pinned[path])
            click.echo(f"{path}: pinned the outputs of {graphs[0].path} for {len(split)} images")
        return

    findings = []
    for path, graphs in networks.items():
        goldens, comparisons = compare_with_goldens(graphs, split, images_sha256, path)
        findings += [Finding(g, path, goldens, comparisons[g.path.name]) for g in graphs]
    if as_json:
        click.echo(json.dumps(to_json(findings), indent=2))
    else:
        for finding in findings:
            click.echo(describe(finding))
    changed: dict[Path, list[str]] = {}
    for finding in findings:
        if not finding.comparison.same:
            changed.setdefault(finding.path, []).append(finding.graph.path.name)
    if changed:
        differences = [
            f"{', '.join(names)}: outputs differ from {path}" for path, names in changed.items()
        ]
        raise CheckFailedError(
            f"{'; '.join(differences)}; if that is meant, pin them with `mnist-bn regress --update`"
        )
