"""The rules that a version must pass to become champion, one function each.

A rule does not raise: a missing report or a broken file is a refusal with a reason, so that all
rules are judged and all problems show at once. An unusable key raises UserError.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from mnist_batchnorm.artifacts.goldens import GOLDEN_FILES, GOLDEN_IMAGES, read_golden_images
from mnist_batchnorm.artifacts.parity_report import JudgedFile, Parity
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Figure,
    Ledger,
    Measured,
    RuleResult,
    Version,
)
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import RegisterParams
from mnist_batchnorm.core.paths import MODELS, PARITY, REGISTERED
from mnist_batchnorm.parity.report import CHECKS
from mnist_batchnorm.promotion.goldens import compare_with_pinned
from mnist_batchnorm.promotion.onnx_model import OnnxModel

ORDER = ("parity", "accuracy", "champion", "goldens", "signature", "rollback")
LINE_WIDTH = 100  # characters

REGISTER_AGAIN = "check its files out and run `mnist-bn register`"


def refusal(reason: str) -> RuleResult:
    """Return a refusal without measured numbers."""
    return RuleResult(passed=False, says=reason, numbers={})


def judge(
    ledger: Ledger, measured: Measured, results: Mapping[str, RuleResult], params: RegisterParams
) -> Decision:
    """Judge a version against the present champion.

    The champion itself is compared with its predecessor, so judging it is idempotent. `results`
    are those of `judge_files` or `recorded_results`.
    """
    number = ledger.number_of(measured.files)
    is_champion = ledger.champion is not None and ledger.champion.version == number
    rival = next(iter(ledger.previous_champions), None) if is_champion else ledger.champion
    found = {
        **results,
        "accuracy": accuracy_rule(measured, params.min_accuracy),
        "champion": champion_rule(number, measured, rival, params.alpha),
        "rollback": rollback_rule(ledger, number),
    }
    rules = {name: found[name] for name in ORDER if name in found}
    if all(result.passed for result in rules.values()):
        return Decision(outcome="promoted", rules=rules)
    return Decision(outcome="kept" if is_champion else "refused", rules=rules)


def judge_files(
    measured: Measured, models: Sequence[OnnxModel], signed_by: str | None
) -> dict[str, RuleResult]:
    """Apply the rules that need the files themselves."""
    results = {"parity": parity_rule(measured), "goldens": goldens_rule(models)}
    if signed_by is not None:
        results["signature"] = signature_rule(Path(signed_by))
    return results


def recorded_results(version: Version, signed_by: str | None) -> dict[str, RuleResult]:
    """Return the results of `judge_files` that the ledger records for a version.

    A signature that was not required then, or was checked with another key, is refused.
    """
    recorded = version.decision.rules
    unknown = refusal(
        f"was not judged when version {version.version} was registered; {REGISTER_AGAIN}"
    )
    results = {name: recorded.get(name, unknown) for name in ("parity", "goldens", "signature")}
    if signed_by is None:
        del results["signature"]
    elif results["signature"].numbers.get("key_sha256") != _sha256(Path(signed_by)):
        results["signature"] = refusal(
            f"version {version.version} was not checked with the key {signed_by}; {REGISTER_AGAIN}"
        )
    return results


def format_decision(decision: Decision) -> str:
    """Format the rules' results as a table, wrapped at `LINE_WIDTH`."""
    lines = []
    for name, result in decision.rules.items():
        head = f"  {'ok' if result.passed else 'REFUSED':<7}  {name:<9}  "
        lines += textwrap.wrap(
            result.says,
            LINE_WIDTH,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def parity_rule(measured: Measured) -> RuleResult:
    """Require the gate's verdict of parity, about exactly these files."""
    try:
        parity = read_record(PARITY, Parity, "verify")
    except UserError as problem:
        return refusal(str(problem))
    if other := _mismatch(parity, measured):
        return refusal(f"{PARITY} {other}; run `dvc repro verify`")
    numbers: dict[str, dict[str, Figure]] = {}
    problems = []
    for name, file in REGISTERED.items():
        graph = parity.graphs[file]
        failed = [check.name for check in graph.checks if check.status != "passed"]
        numbers[name] = {"checks": len(graph.checks), "passed": len(graph.checks) - len(failed)}
        if not graph.proven:
            problems.append(f"{file}: {', '.join(failed) or graph.verdict}")
    passed = not problems and parity.proves(REGISTERED.values())
    counts = " and ".join(str(number["checks"]) for number in numbers.values())
    return RuleResult(
        passed=passed,
        says=f"both files compute what their checkpoint computes: all {counts} checks passed"
        if passed
        else f"no parity: {'; '.join(problems) or PARITY}; `dvc repro verify` shows the evidence",
        numbers={**numbers},
    )


def _mismatch(parity: Parity, measured: Measured) -> str | None:
    """Return how a report is not about these files or not by the present gate; None if it is."""
    judged: dict[str, tuple[JudgedFile, str]] = {"test images": (parity.data, measured.test_sha256)}
    for name, file in REGISTERED.items():
        graph = parity.graphs.get(file)
        if graph is None:
            return f"says nothing about {MODELS / file}"
        names = [check.name for check in graph.checks]
        if names != list(CHECKS):
            return f"is not of today's gate: its checks are {', '.join(names) or 'none'}"
        judged[graph.onnx.path] = (graph.onnx, measured.files[name].sha256)
        judged[graph.weights.path] = (graph.weights, measured.weights_sha256)
    for what, (file_then, sha256) in judged.items():
        if file_then.sha256 != sha256:
            return (
                f"is about a {file_then.path} with SHA-256 {file_then.sha256[:12]}…, but "
                f"the {'test images are' if what == 'test images' else 'file is'} {sha256[:12]}…"
            )
    return None


def accuracy_rule(measured: Measured, minimum: float) -> RuleResult:
    """Require an accuracy on the test images, of each file."""
    accuracies = {name: measured.accuracy(name) for name in REGISTERED}
    passed = min(accuracies.values()) >= minimum
    shares = " and ".join(f"{share:.4f}" for share in accuracies.values())
    return RuleResult(
        passed=passed,
        says=f"{shares} of {measured.test_images:,} test images right, "
        f"{'at least' if passed else 'demanded are'} {minimum:g}",
        numbers={
            "minimum": minimum,
            **{name: {"accuracy": share} for name, share in accuracies.items()},
        },
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the one-sided p-value of the exact McNemar test.

    The probability that at least ``only_first`` of the images that just one of two equally good
    classifiers gets right are the first's (McNemar, "Note on the sampling error of the difference
    between correlated proportions or percentages", Psychometrika 12, 1947, in its exact binomial
    form). Integer arithmetic up to one division, so every machine gives the same bits.
    """
    n = only_first + only_second
    # C(n, k) from C(n, k - 1), where k images are the second's
    ways = accumulate(range(1, only_second + 1), lambda c, k: c * (n - k + 1) // k, initial=1)
    return sum(ways) / (1 << n)


def champion_rule(
    number: int, measured: Measured, rival: Version | None, alpha: float
) -> RuleResult:
    """Refuse a version of which either file is significantly worse than the rival's."""
    if rival is None:
        return RuleResult(passed=True, says="there was no champion to compare with", numbers={})
    if rival.test_sha256 != measured.test_sha256:
        return refusal(
            f"version {rival.version}, the champion, was measured on other test images (SHA-256 "
            f"{rival.test_sha256[:12]}…) than these ({measured.test_sha256[:12]}…): take the old "
            f'ones, or decide with `mnist-bn promote {number} --override "reason"`'
        )
    numbers: dict[str, dict[str, Figure]] = {}
    for name in REGISTERED:
        ours, theirs = set(measured.errors[name]), set(rival.errors[name])
        rival_right, ours_right = len(ours - theirs), len(theirs - ours)
        numbers[name] = {
            "only_champion_right": rival_right,
            "only_candidate_right": ours_right,
            "p": mcnemar(rival_right, ours_right),
        }
    passed = all(number["p"] > alpha for number in numbers.values())
    findings = ", ".join(
        f"{name}: {n['only_candidate_right']} images right that it gets wrong, "
        f"{n['only_champion_right']} wrong that it gets right, p = {n['p']:.2g}"
        for name, n in numbers.items()
    )
    return RuleResult(
        passed=passed,
        says=f"{'not significantly ' if passed else ''}worse than version {rival.version}, the "
        f"champion (alpha {alpha:g}): {findings}",
        numbers={"version": rival.version, "alpha": alpha, **numbers},
    )


def goldens_rule(models: Sequence[OnnxModel]) -> RuleResult:
    """Require the pinned outputs."""
    if not GOLDEN_IMAGES.exists():  # first: `read_golden_images` names a folder of this machine
        return refusal(f"no {GOLDEN_IMAGES}, the images of the goldens; restore it with git")
    try:
        pinned, comparisons = compare_with_pinned(models, *read_golden_images())
    except (UserError, CheckFailedError) as problem:
        return refusal(str(problem))
    numbers = {
        name: {
            "max_change": comparisons[file].max_change,
            "images_beyond": comparisons[file].images_beyond,
            "flips": len(comparisons[file].flips),
        }
        for name, file in REGISTERED.items()
    }
    count = len(pinned.images)
    passed = all(comparison.same for comparison in comparisons.values())
    beyond, flips = (max(n[key] for n in numbers.values()) for key in ("images_beyond", "flips"))
    return RuleResult(
        passed=passed,
        says=f"both files give the pinned outputs for {count} images"
        if passed
        else f"outputs differ from {GOLDEN_FILES['bn']} for {beyond} of {count} images, "
        f"predictions for {flips}; if that is meant, pin them with `mnist-bn regress --update`",
        numbers={**numbers},
    )


def signature_rule(key: Path) -> RuleResult:
    """Require a signature by the private key of a public key."""
    from mnist_batchnorm.signing.signer import signature_problem

    key_sha256 = _sha256(key)
    if key_sha256 is None:
        return refusal(f"no {key}, the public key that register.signed_by names")
    problem = signature_problem(MODELS, key)
    return RuleResult(
        passed=problem is None,
        says=problem or f"signed with the key that {key} belongs to",
        numbers={"key_sha256": key_sha256},
    )


def _sha256(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def rollback_rule(ledger: Ledger, number: int) -> RuleResult:
    """Refuse a version that a person rolled back."""
    if ledger.was_rolled_back(number):
        return refusal(
            f"version {number} was rolled back: only `mnist-bn promote {number} --override "
            '"reason"` promotes it again'
        )
    return RuleResult(passed=True, says="was never rolled back", numbers={})
