"""Stage register: the ONNX files become a version, and champion if every rule allows it.

The champion is decided here, from files, and written to a file; what MLflow's model registry shows
is a view of it.
"""

from pathlib import Path

import click

from mnist_batchnorm.dataset import load_split, network_input
from mnist_batchnorm.errors import CheckFailedError, UserError
from mnist_batchnorm.files import digest, write_json
from mnist_batchnorm.history import History
from mnist_batchnorm.layout import (
    CHECKPOINT,
    MODELS,
    PROMOTION,
    REGISTERED,
    REGISTRY,
    TEST_SPLIT,
)
from mnist_batchnorm.ledger import Hashes, Ledger, Measured, PromotedByRules, Version, locked
from mnist_batchnorm.params import RegisterParams, load_params
from mnist_batchnorm.parity.runtime import BATCH_SIZE
from mnist_batchnorm.regress import Graph, load_graph
from mnist_batchnorm.rules import judge, judge_files


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


def register(params: RegisterParams) -> tuple[Ledger, Version]:
    """Register the present files, judge them, and write down what came of it.

    Returns:
        The ledger afterwards, and the version that the files are.

    Raises:
        UserError: A file is missing or unreadable, or the ledger is not usable.
        CheckFailedError: An ONNX file gives no logits.
    """
    measured, graphs = measure()
    findings = judge_files(measured, graphs, params.signed_by)
    with locked(REGISTRY):
        require_ledger()
        ledger = Ledger.load(REGISTRY)
        known = ledger.find(measured.files)
        if known and not findings["parity"].passed:  # the checkpoint may be another's
            measured = measured.model_copy(update={"weights_sha256": known.weights_sha256})
        decision = judge(ledger, measured, findings, params)
        number = ledger.number_of(measured.files)
        ledger = ledger.with_version(measured, decision)
        if decision.outcome == "promoted":
            ledger = ledger.with_event(PromotedByRules(version=number))
        ledger.save(REGISTRY)
        version = ledger.versions[number - 1]
        write_json(PROMOTION, promotion(version))
    return ledger, version


def require_ledger() -> None:
    """Make sure that no ledger was here that is not here now: that would begin anew.

    Raises:
        UserError: Git has one, and the working tree does not.
    """
    if not REGISTRY.exists() and History(Path.cwd()).holds(REGISTRY):
        raise UserError(
            f"{REGISTRY} is gone, but git has it: without it every champion is forgotten; "
            f"`git checkout -- {REGISTRY}` restores it, `git rm {REGISTRY}` and a commit begin anew"
        )


def promotion(version: Version) -> dict[str, object]:
    """Return the content of ``reports/promotion.json``, which docs/promotion.md describes."""
    content = version.model_dump(mode="json", exclude={"errors", "decision"})
    return {
        "schema": 1,
        "version": content.pop("version"),
        **version.decision.model_dump(mode="json"),
        **content,
    }


@click.command()
@click.option(
    "--require", is_flag=True, help="Fail unless these files are the champion afterwards."
)
def command(require: bool) -> None:
    """Register models/bn.onnx and bn-folded.onnx, and make them champion if every rule allows it.

    Writes models/registry.json and reports/promotion.json. Exit status: 0 judged, whatever the
    outcome; 1 with --require, they are not the champion; 2 there is nothing to judge.
    """
    ledger, version = register(load_params().registration)
    decision = version.decision
    click.echo(f"version {version.version}: {decision.outcome}")
    click.echo(decision.table())
    click.echo(ledger.headline)
    if require and decision.outcome == "refused":
        refusals = "; ".join(f"{name}: {rule.says}" for name, rule in decision.refusals.items())
        raise CheckFailedError(f"version {version.version} is not the champion: {refusals}")
