"""TODO."""

from pathlib import Path

from mnist_batchnorm.artifacts.promotion_report import promotion
from mnist_batchnorm.artifacts.registry_file import Ledger, PromotedByRules, Version, locked
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.core.params import RegisterParams
from mnist_batchnorm.core.paths import PROMOTION, REGISTRY
from mnist_batchnorm.lineage.git import History
from mnist_batchnorm.promotion.measure import measure
from mnist_batchnorm.promotion.rules import judge, judge_files


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
