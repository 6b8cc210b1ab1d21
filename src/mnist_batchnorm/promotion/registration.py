"""Register the present files as a version, and decide whether it becomes champion."""

from pathlib import Path

from mnist_batchnorm.artifacts.promotion_report import write_promotion
from mnist_batchnorm.artifacts.registry_file import Ledger, PromotedByRules, Version, locked
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import RegisterParams
from mnist_batchnorm.core.paths import REGISTRY
from mnist_batchnorm.lineage.git import GitHistory
from mnist_batchnorm.promotion.measure import measure
from mnist_batchnorm.promotion.rules import judge, judge_files


def register(params: RegisterParams) -> tuple[Ledger, Version]:
    """Register and judge the present files; update the ledger and the promotion report.

    Returns:
        The updated ledger, and the version of the present files.

    Raises:
        UserError: A file is missing or unreadable, or the ledger is not usable.
        CheckFailedError: An ONNX file does not give logits.
    """
    measured, models = measure()
    results = judge_files(measured, models, params.signed_by)
    with locked(REGISTRY):
        if not REGISTRY.exists() and GitHistory(Path.cwd()).has_file(REGISTRY):
            raise UserError(
                f"{REGISTRY} is gone, but git has it: without it every champion is forgotten; "
                f"`git checkout -- {REGISTRY}` restores it, `git rm {REGISTRY}` and a commit begin "
                "anew"
            )
        ledger = Ledger.load(REGISTRY)
        known = ledger.find(measured.files)
        if known and not results["parity"].passed:  # the checkpoint may belong to other files
            measured = measured.model_copy(update={"weights_sha256": known.weights_sha256})
        decision = judge(ledger, measured, results, params)
        number = ledger.number_of(measured.files)
        ledger = ledger.with_version(measured, decision)
        if decision.outcome == "promoted":
            ledger = ledger.with_event(PromotedByRules(version=number))
        ledger.save(REGISTRY)
        version = ledger.versions[number - 1]
        write_promotion(version)
    return ledger, version
