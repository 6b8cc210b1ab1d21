"""Command promote: make a registered version champion, by the rules or by a person's override."""

import json

import click

from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Ledger,
    Measured,
    PromotedByOverride,
    PromotedByRules,
    RuleResult,
    Version,
    locked,
)
from mnist_batchnorm.commands.champion import (
    publish_champion,
    require_registry,
    validate_reason,
    who_and_when,
)
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import RegisterParams, load_params
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED, REGISTRY, TEST_SPLIT
from mnist_batchnorm.promotion.measure import measure
from mnist_batchnorm.promotion.rules import format_decision, judge, judge_files, recorded_results


def measured_and_results(
    version: Version, signed_by: str | None
) -> tuple[Measured, dict[str, RuleResult]]:
    """Measure and judge the version's files if they are present; else use the ledger's record."""
    files = {MODELS / file: version.files[name].sha256 for name, file in REGISTERED.items()}
    present = {path: digest(path) for path in files if path.is_file()}
    if present != files or not (CHECKPOINT.is_file() and TEST_SPLIT.is_file()):
        return version, recorded_results(version, signed_by)
    measured, models = measure()
    return measured, judge_files(measured, models, signed_by)


def get_version(ledger: Ledger, number: int) -> Version:
    """Return a version by its number; UserError if there is none."""
    if not 1 <= number <= len(ledger.versions):
        numbers = ", ".join(str(version.version) for version in ledger.versions) or "none"
        raise UserError(f"no version {number} in {REGISTRY}; there are: {numbers}")
    return ledger.versions[number - 1]


def promote(
    ledger: Ledger, number: int, override_reason: str | None, params: RegisterParams
) -> tuple[Ledger, Decision]:
    """Judge a version other than the champion, and promote it if that is allowed.

    Returns:
        The new ledger, unchanged if the version is refused, and the rules' decision.
    """
    measured, results = measured_and_results(get_version(ledger, number), params.signed_by)
    decision = judge(ledger, measured, results, params)
    if decision.outcome == "promoted":
        ledger = ledger.with_version(measured, decision)
    if override_reason is not None and "parity" not in decision.refusals:
        event = PromotedByOverride(version=number, why=override_reason, **who_and_when())
        ledger = ledger.with_event(event)
    elif decision.outcome == "promoted":
        ledger = ledger.with_event(PromotedByRules(version=number))
    return ledger, decision


@click.command()
@click.argument("version", type=int)
@click.option("--override", metavar="REASON", help="Promote against all rules but parity.")
@click.option("--json", "as_json", is_flag=True, help="Print the rules' results as JSON.")
def command(version: int, override: str | None, as_json: bool) -> None:
    """Make a registered VERSION the champion.

    Applies the rules of stage register against the present champion: to the version's files if
    they are in models/, else to the record in models/registry.json. Exit status: 0 it is the
    champion, 1 a rule refuses, 2 there is no such version.
    """
    override_reason = None if override is None else validate_reason(override)
    if override_reason == "":
        raise UserError("--override needs a reason: models/registry.json records it")
    params = load_params().registration
    require_registry()
    with locked(REGISTRY):
        before = Ledger.load(REGISTRY)
        registered = get_version(before, version)
        is_champion = registered == before.champion
        if is_champion:
            after, decision = before, registered.decision
        else:
            after, decision = promote(before, version, override_reason, params)
            if after != before:
                after.save(REGISTRY)
    if as_json:
        champion = after.champion.version if after.champion else None
        rules = decision.model_dump(mode="json")["rules"]
        content = {"version": version, "champion": champion, "rules": rules}
        click.echo(json.dumps(content, indent=2))
    else:
        click.echo(f"version {version}\n{format_decision(decision)}")
    if after == before and not is_champion:
        if override_reason is not None:
            raise CheckFailedError(f"nothing overrides parity: {decision.refusals['parity'].says}")
        raise CheckFailedError(f"version {version} is not promoted: {decision.describe_refusals()}")
    publish_champion(after, to_stderr=as_json)
