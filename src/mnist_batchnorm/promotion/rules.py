"""What a version must do to become champion: one function a rule, and each says why.

A rule does not raise for what it is about: a missing report or a broken file is a refusal with a
reason, so that all rules are judged and a person sees everything that is wrong at once. A key that
is none is the caller's mistake, and ends the judging.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_batchnorm.artifacts.goldens import GOLDENS, IMAGES, load_fixture
from mnist_batchnorm.artifacts.parity_report import JudgedFile, Parity
from mnist_batchnorm.artifacts.reading import read_record
from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Figure,
    Ledger,
    Measured,
    Rule,
    Version,
)
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import RegisterParams
from mnist_batchnorm.core.paths import MODELS, PARITY, REGISTERED
from mnist_batchnorm.parity.report import CHECKS
from mnist_batchnorm.promotion.goldens import compare_with_goldens
from mnist_batchnorm.promotion.graph import Graph

AGAIN = "check its files out and run `mnist-bn register`"


def refusal(says: str) -> Rule:
    """Return what a rule says that had nothing to measure."""
    return Rule(passed=False, says=says, numbers={})


def judge(
    ledger: Ledger, measured: Measured, findings: Mapping[str, Rule], params: RegisterParams
) -> Decision:
    """Judge a version against the champion of today.

    The champion itself is compared with the one that it replaced, so that judging it once more
    says the same again.

    Args:
        ledger: what is known; it may know the version.
        measured: the version.
        findings: of the rules that need the files themselves, `judge_files` or `recorded`.
        params: what is demanded.
    """
    number = ledger.number_of(measured.files)
    is_champion = ledger.champion is not None and ledger.champion.version == number
    rival = next(iter(ledger.previous_champions), None) if is_champion else ledger.champion
    found = {
        **findings,
        "accuracy": accuracy_rule(measured, params.min_accuracy),
        "champion": champion_rule(number, measured, rival, params.alpha),
        "rollback": rollback_rule(ledger, number),
    }
    order = ("parity", "accuracy", "champion", "goldens", "signature", "rollback")
    rules = {name: found[name] for name in order if name in found}
    if all(rule.passed for rule in rules.values()):
        return Decision(outcome="promoted", rules=rules)
    return Decision(outcome="kept" if is_champion else "refused", rules=rules)


def judge_files(
    measured: Measured, graphs: Sequence[Graph], signed_by: str | None
) -> dict[str, Rule]:
    """Judge what only the files on disk show."""
    findings = {"parity": parity_rule(measured), "goldens": goldens_rule(graphs)}
    if signed_by is not None:
        findings["signature"] = signature_rule(Path(signed_by))
    return findings


def recorded(version: Version, signed_by: str | None) -> dict[str, Rule]:
    """Return what `judge_files` found when the stage last had the version's files.

    A signature that was not demanded then, or was checked with another key, is refused.
    """
    then = version.decision.rules
    unknown = refusal(f"was not judged when version {version.version} was registered; {AGAIN}")
    findings = {name: then.get(name, unknown) for name in ("parity", "goldens")}
    if signed_by is not None:
        findings["signature"] = then.get("signature", unknown)
        if findings["signature"].numbers.get("key_sha256") != _sha256(Path(signed_by)):
            findings["signature"] = refusal(
                f"version {version.version} was not checked with the key {signed_by}; {AGAIN}"
            )
    return findings


def parity_rule(measured: Measured) -> Rule:
    """Demand the gate's verdict that these very files compute what the checkpoint computes."""
    try:
        parity = read_record(PARITY, Parity, "verify")
    except UserError as problem:
        return refusal(str(problem))
    if other := about_something_else(parity, measured):
        return refusal(f"{PARITY} {other}; run `dvc repro verify`")
    numbers: dict[str, dict[str, Figure]] = {}
    problems = []
    for name, file in REGISTERED.items():
        graph = parity.graphs[file]
        failed = [check.name for check in graph.checks if check.status != "passed"]
        numbers[name] = {"checks": len(graph.checks), "passed": len(graph.checks) - len(failed)}
        if not graph.proven:
            problems.append(f"{file}: {', '.join(failed) or graph.verdict}")
    if problems or not parity.proves(REGISTERED.values()):
        says = f"no parity: {'; '.join(problems) or PARITY}; `dvc repro verify` shows the evidence"
        return Rule(passed=False, says=says, numbers={**numbers})
    counts = " and ".join(str(number["checks"]) for number in numbers.values())
    says = f"both files compute what their checkpoint computes: all {counts} checks passed"
    return Rule(passed=True, says=says, numbers={**numbers})


def about_something_else(parity: Parity, measured: Measured) -> str | None:
    """Say why a report is none of today's gate about these very files; None if it is."""
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
    for what, (then, sha256) in judged.items():
        if then.sha256 != sha256:
            return (
                f"is about a {then.path} with SHA-256 {then.sha256[:12]}…, but "
                f"the {'test images are' if what == 'test images' else 'file is'} {sha256[:12]}…"
            )
    return None


def accuracy_rule(measured: Measured, minimum: float) -> Rule:
    """Demand an accuracy of each file on the test images."""
    accuracies = {name: measured.accuracy(name) for name in REGISTERED}
    passed = min(accuracies.values()) >= minimum
    shares = " and ".join(f"{share:.4f}" for share in accuracies.values())
    return Rule(
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

    McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12 (1947), in its exact binomial form: if neither of two classifiers
    is better, each image that only one of them gets right is equally likely to be either's. In
    whole numbers up to the one division, so that every machine gets the same bits.

    Args:
        only_first: images that only the first gets right.
        only_second: images that only the second gets right.

    Returns:
        How likely at least ``only_first`` of the images on which they differ would be the
        first's, if the second were as good.
    """
    n = only_first + only_second
    ways = total = 1  # of n images, all n the first's
    for k in range(n, only_first, -1):
        ways = ways * k // (n - k + 1)  # C(n, k - 1) from C(n, k)
        total += ways
    return total / (1 << n)


def champion_rule(number: int, measured: Measured, rival: Version | None, alpha: float) -> Rule:
    """Refuse what is significantly worse than the champion, for either name.

    Args:
        number: of the version that is judged.
        measured: the version.
        rival: the champion that it is compared with.
        alpha: level of the test.
    """
    if rival is None:
        return Rule(passed=True, says="there was no champion to compare with", numbers={})
    if rival.test_sha256 != measured.test_sha256:
        return refusal(
            f"version {rival.version}, the champion, was measured on other test images (SHA-256 "
            f"{rival.test_sha256[:12]}…) than these ({measured.test_sha256[:12]}…): take the old "
            f'ones, or decide with `mnist-bn promote {number} --override "reason"`'
        )
    numbers: dict[str, dict[str, Figure]] = {}
    for name in REGISTERED:
        ours, theirs = set(measured.errors[name]), set(rival.errors[name])
        only_champion, only_candidate = len(ours - theirs), len(theirs - ours)
        p = mcnemar(only_champion, only_candidate)
        numbers[name] = {
            "only_champion_right": only_champion,
            "only_candidate_right": only_candidate,
            "p": p,
        }
    passed = all(number["p"] > alpha for number in numbers.values())
    findings = ", ".join(
        f"{name}: {n['only_candidate_right']} images right that it gets wrong, "
        f"{n['only_champion_right']} wrong that it gets right, p = {n['p']:.2g}"
        for name, n in numbers.items()
    )
    return Rule(
        passed=passed,
        says=f"{'not significantly ' if passed else ''}worse than version {rival.version}, the "
        f"champion (alpha {alpha:g}): {findings}",
        numbers={"version": rival.version, "alpha": alpha, **numbers},
    )


def goldens_rule(graphs: Sequence[Graph]) -> Rule:
    """Demand the outputs that somebody has pinned."""
    if not IMAGES.exists():  # before `load_fixture` says in which folder of which machine
        return refusal(f"no {IMAGES}, the images of the goldens; restore it with git")
    try:
        goldens, comparisons = compare_with_goldens(graphs, *load_fixture())
    except (UserError, CheckFailedError) as problem:
        return refusal(str(problem))
    numbers: dict[str, dict[str, Figure]] = {}
    for name, file in REGISTERED.items():
        comparison = comparisons[file]
        numbers[name] = {
            "max_change": comparison.max_change,
            "images_beyond": comparison.images_beyond,
            "flips": len(comparison.flips),
        }
    count = len(goldens.images)
    if all(comparison.same for comparison in comparisons.values()):
        says = f"both files give the pinned outputs for {count} images"
        return Rule(passed=True, says=says, numbers={**numbers})
    beyond, flips = (max(n[key] for n in numbers.values()) for key in ("images_beyond", "flips"))
    says = (
        f"outputs differ from {GOLDENS} for {beyond} of {count} images, predictions for {flips}; "
        "if that is meant, pin them with `mnist-bn regress --update`"
    )
    return Rule(passed=False, says=says, numbers={**numbers})


def signature_rule(key: Path) -> Rule:
    """Demand that the files are signed with the private key that belongs to a public one."""
    from mnist_batchnorm.signing.signer import signature_problem

    key_sha256 = _sha256(key)
    if key_sha256 is None:
        return refusal(f"no {key}, the public key that register.signed_by names")
    problem = signature_problem(MODELS, key)
    return Rule(
        passed=problem is None,
        says=problem or f"signed with the key that {key} belongs to",
        numbers={"key_sha256": key_sha256},
    )


def _sha256(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def rollback_rule(ledger: Ledger, number: int) -> Rule:
    """Respect that a person has taken the version back."""
    if ledger.was_rolled_back(number):
        return refusal(
            f"version {number} was rolled back: only `mnist-bn promote {number} --override "
            '"reason"` promotes it again'
        )
    return Rule(passed=True, says="was never rolled back", numbers={})
