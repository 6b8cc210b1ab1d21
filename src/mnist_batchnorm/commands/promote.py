"""Tool promote: a registered version becomes champion, by the rules or because a person says so."""

import json

import click

from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Ledger,
    Measured,
    PromotedByOverride,
    PromotedByRules,
    Rule,
    Version,
    locked,
)
from mnist_batchnorm.commands.champion import announce, reason, require_registry, when, who
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import RegisterParams, load_params
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED, REGISTRY, TEST_SPLIT
from mnist_batchnorm.promotion.measure import measure
from mnist_batchnorm.promotion.rules import judge, judge_files, recorded


def is_present(version: Version) -> bool:
    """Tell whether the files on disk are the version's, with what is needed to judge them."""
    files = {MODELS / file: version.files[name].sha256 for name, file in REGISTERED.items()}
    needed = (*files, CHECKPOINT, TEST_SPLIT)
    return all(path.is_file() for path in needed) and all(
        digest(path) == sha256 for path, sha256 in files.items()
    )


def evidence(version: Version, signed_by: str | None) -> tuple[Measured, dict[str, Rule]]:
    """Gather what the rules judge: the files where they are here, else what the ledger holds.

    Raises:
        UserError: The test images cannot be read.
        CheckFailedError: An ONNX file gives no logits.
    """
    if not is_present(version):
        return version, recorded(version, signed_by)
    measured, graphs = measure()
    return measured, judge_files(measured, graphs, signed_by)


def find(ledger: Ledger, number: int) -> Version:
    """Return a version by its number.

    Raises:
        UserError: There is none of that number.
    """
    if not 1 <= number <= len(ledger.versions):
        there = ", ".join(str(version.version) for version in ledger.versions) or "none"
        raise UserError(f"no version {number} in {REGISTRY}; there are: {there}")
    return ledger.versions[number - 1]


def promote(
    ledger: Ledger, number: int, why: str | None, params: RegisterParams
) -> tuple[Ledger, Decision]:
    """Judge a version that is not champion, and make it champion if that is allowed.

    Args:
        ledger: as it is.
        number: the version's.
        why: the reason to override the rules; None to go by them.
        params: what the rules demand.

    Returns:
        The ledger afterwards, the same where a rule has the last word, and what the rules say.

    Raises:
        UserError: There is no such version, or the test images cannot be read.
        CheckFailedError: An ONNX file gives no logits.
    """
    measured, findings = evidence(find(ledger, number), params.signed_by)
    decision = judge(ledger, measured, findings, params)
    passed = decision.outcome == "promoted"
    after = ledger.with_version(measured, decision) if passed else ledger
    if why is not None and "parity" not in decision.refusals:
        event = PromotedByOverride(version=number, who=who(), when=when(), why=why)
        return after.with_event(event), decision
    if passed:
        return after.with_event(PromotedByRules(version=number)), decision
    return ledger, decision


@click.command()
@click.argument("version", type=int)
@click.option("--override", metavar="REASON", help="Promote whatever the rules say, but parity.")
@click.option("--json", "as_json", is_flag=True, help="Print what the rules say as JSON.")
def command(version: int, override: str | None, as_json: bool) -> None:
    """Make a registered VERSION the champion.

    Judges it by the rules of stage register against the champion of today: on its files where they
    are in models/, else by what models/registry.json holds. Exit status: 0 it is the champion, 1 a
    rule refuses, 2 there is no such version.
    """
    why = None if override is None else reason(override)
    if why == "":
        raise UserError("--override needs a reason: it is what models/registry.json will say")
    params = load_params().registration
    require_registry()
    with locked(REGISTRY):
        before = Ledger.load(REGISTRY)
        is_champion = find(before, version) == before.champion
        if is_champion:
            after, decision = before, find(before, version).decision
        else:
            after, decision = promote(before, version, why, params)
            if after != before:
                after.save(REGISTRY)
    _tell(version, after, decision, as_json)
    if after == before and not is_champion:
        _refuse(version, decision, why)
    announce(after, to_stderr=as_json)


def _tell(version: int, after: Ledger, decision: Decision, as_json: bool) -> None:
    champion = after.champion.version if after.champion else None
    if as_json:
        rules = decision.model_dump(mode="json")["rules"]
        click.echo(json.dumps({"version": version, "champion": champion, "rules": rules}, indent=2))
    else:
        click.echo(f"version {version}")
        click.echo(decision.table())


def _refuse(version: int, decision: Decision, why: str | None) -> None:
    refusals = decision.refusals
    if why is not None:
        raise CheckFailedError(f"nothing overrides parity: {refusals['parity'].says}")
    raise CheckFailedError(
        f"version {version} is not promoted: "
        + "; ".join(f"{name}: {rule.says}" for name, rule in refusals.items())
    )
