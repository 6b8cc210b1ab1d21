"""models/registry.json: what is written is read back, and what is broken is said to be."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mnist_batchnorm.artifacts import registry_file as module
from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Hashes,
    Ledger,
    Measured,
    PromotedByOverride,
    PromotedByRules,
    RolledBack,
    RuleResult,
    locked,
)
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import REGISTERED, REGISTRY
from tests.conftest import MnistBn

WHEN = "2026-01-02T03:04:05Z"
PROVEN = {"parity": RuleResult(passed=True, says="computes what it should", numbers={})}
REFUSED = Decision(outcome="refused", rules=PROVEN)


def measured(seed: int, errors: tuple[int, ...] = (3, 14, 159)) -> Measured:
    """Two files that differ from those of any other seed."""
    return Measured(
        weights_sha256=f"{seed:064x}",
        test_sha256="0" * 64,
        test_images=500,
        files={
            name: Hashes(sha256=f"{seed:x}{kind}".zfill(64), md5=f"{seed:032x}")
            for kind, name in enumerate(REGISTERED)
        },
        errors=dict.fromkeys(REGISTERED, errors),
    )


def of(versions: int, *promoted: int) -> Ledger:
    """A ledger with so many versions, of which these were promoted in turn."""
    ledger = Ledger()
    for seed in range(versions):
        ledger = ledger.with_version(measured(seed), REFUSED)
    for number in promoted:
        ledger = ledger.with_event(PromotedByRules(version=number))
    return ledger


def rolled_back(version: int, to: int) -> RolledBack:
    return RolledBack(version=version, to=to, who="somebody", when=WHEN, why=None)


words = st.text(st.characters(codec="utf-8"), max_size=12)
figures = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
rules = st.builds(
    RuleResult,
    passed=st.booleans(),
    says=words,
    numbers=st.dictionaries(
        words, figures | words | st.dictionaries(words, figures, max_size=2), max_size=3
    ),
)
decisions = st.builds(
    Decision,
    outcome=st.sampled_from(["promoted", "refused", "kept"]),
    rules=st.dictionaries(words, rules, max_size=3).map(lambda some: some | PROVEN),
)
errors = st.sets(st.integers(0, 9999), max_size=20).map(lambda some: tuple(sorted(some)))


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[Ledger, list[int]]:
    """A ledger with any history, and its champions, the present one last."""
    ledger, pile = Ledger(), list[int]()
    for _ in range(draw(st.integers(0, 8))):
        count = len(ledger.versions)
        match draw(st.sampled_from(["register", "rules", "override", "back"])):
            case "register":
                candidate = measured(draw(st.integers(0, 5)), draw(errors))
                ledger = ledger.with_version(candidate, draw(decisions))
            case "back" if len(pile) > 1:
                why = draw(st.none() | words.filter(bool))
                event = RolledBack(
                    version=pile.pop(), to=pile[-1], who="somebody", when=WHEN, why=why
                )
                ledger = ledger.with_event(event)
            case "rules" | "override" as by if count:
                number = draw(st.integers(1, count))
                promoted: PromotedByRules | PromotedByOverride = PromotedByRules(version=number)
                if by == "override":
                    promoted = PromotedByOverride(
                        version=number, who="somebody", when=WHEN, why=draw(words.filter(bool))
                    )
                ledger = ledger.with_event(promoted)
                if pile[-1:] != [number]:
                    pile.append(number)
    return ledger, pile


# --- round trip ---------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ledgers())
def test_what_is_written_is_read_back(tmp_path: Path, history: tuple[Ledger, list[int]]) -> None:
    ledger, pile = history
    path = tmp_path / "registry.json"
    ledger.save(path)
    content = path.read_bytes()
    loaded = Ledger.load(path)
    assert loaded == ledger
    assert [version.version for version in reversed(loaded.previous_champions)] == pile[:-1]
    assert (loaded.champion.version if loaded.champion else None) == (pile[-1] if pile else None)
    loaded.save(path)
    assert path.read_bytes() == content


def test_no_file_is_an_empty_ledger(tmp_path: Path) -> None:
    ledger = Ledger.load(tmp_path / "registry.json")
    assert (ledger, ledger.champion, ledger.previous_champions) == (Ledger(), None, ())
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_file_are_one_line(tmp_path: Path) -> None:
    ledger = of(1).with_version(measured(1, ()), REFUSED)
    why = "[\n1,\n2]"  # looks like numbers and is none
    ledger = ledger.with_event(PromotedByOverride(version=1, who="a", when=WHEN, why=why))
    path = tmp_path / "registry.json"
    ledger.save(path)
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert lines.count('"mnist-bn": [3, 14, 159],') == 1
    assert lines.count('"mnist-bn": [],') == 1
    assert Ledger.load(path) == ledger
    assert lines[1:4] == ['"schema": 1,', '"versions": [', "{"]
    assert lines[4] == '"version": 1,'


# --- champion and versions ----------------------------------------------------------------------


def test_promotion_of_the_champion_changes_nothing() -> None:
    ledger = of(2, 1, 2)
    assert ledger.with_event(PromotedByRules(version=2)) == ledger
    assert [version.version for version in of(2, 1, 2, 2, 1).previous_champions] == [2, 1]


def test_second_rollback_goes_further_back() -> None:
    ledger = of(3, 1, 2, 3).with_event(rolled_back(3, to=2)).with_event(rolled_back(2, to=1))
    assert ledger.champion == ledger.versions[0]
    assert [ledger.was_rolled_back(number) for number in (1, 2, 3)] == [False, True, True]


def test_same_files_keep_their_number_and_take_the_new_measurement() -> None:
    ledger = of(3, 2)
    again = ledger.with_version(measured(1, (7,)), Decision(outcome="kept", rules=PROVEN))
    assert [version.version for version in again.versions] == [1, 2, 3]
    assert again.champion == again.versions[1]
    assert again.versions[1].errors["mnist-bn"] == (7,)
    assert again.versions[1].decision.outcome == "kept"
    assert (again.versions[0], again.versions[2]) == (ledger.versions[0], ledger.versions[2])


def test_one_other_file_is_another_version() -> None:
    ledger = of(1)
    first = measured(0)
    other = first.model_copy(
        update={"files": first.files | {"mnist-bn-folded": measured(9).files["mnist-bn-folded"]}}
    )
    assert ledger.number_of(other.files) == 2
    assert ledger.find(other.files) is None


def test_ledger_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        of(1).versions = ()  # type: ignore[misc]


# --- broken files -------------------------------------------------------------------------------


def edit(change: Callable[[Any], object]) -> Callable[[str], str]:
    def damage(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return damage


def rules_of(content: Any, version: int) -> Any:
    return content["versions"][version]["decision"]["rules"]


OTHER_SIDE = "<<<<<<< HEAD\n  1,\n=======\n  2,\n>>>>>>> theirs\n"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda _: "", "the file: Invalid JSON"),
        (lambda text: text[:300], "the file: Invalid JSON"),
        (lambda _: "[]", "the file: "),
        (lambda _: "\udcff", "the file: Invalid JSON"),
        (lambda text: text + OTHER_SIDE, "holds both sides of a merge"),
        (edit(lambda c: c.update(schema=2)), "schema: "),
        (edit(lambda c: c.update(champion=2)), "champion: Extra inputs are not permitted"),
        (edit(lambda c: c["versions"][0].pop("files")), "versions.0.files: Field required"),
        (edit(lambda c: c["versions"].pop(0)), "not numbered 1, 2, 3"),
        (edit(lambda c: c["versions"][1].update(version=1)), "not numbered 1, 2, 3"),
        (
            edit(lambda c: c["versions"][1].update(files=c["versions"][0]["files"])),
            "version 2 is of the same files as another",
        ),
        (
            edit(lambda c: c["versions"][1]["errors"]["mnist-bn"].append(4)),
            "versions.1: errors are not the ascending positions",
        ),
        (
            edit(lambda c: c["versions"][1]["errors"]["mnist-bn"].append("4")),
            "versions.1.errors.mnist-bn.3: ",
        ),
        (edit(lambda c: c["versions"][1]["errors"].pop("mnist-bn")), "versions.1: is about"),
        (edit(lambda c: c["versions"][1].update(test_images=2)), "versions.1: errors are not"),
        (edit(lambda c: c["events"][0].update(version=9)), "version 9 was promoted, but there is"),
        (edit(lambda c: c["events"][0].update(by="magic")), "events.0.promoted: "),
        (edit(lambda c: c["events"][0].update(who="me")), "events.0.promoted.rules.who: Extra"),
        (edit(lambda c: c["events"][0].update(event="demoted")), "events.0: "),
        (edit(lambda c: c["events"][2].update(to=2)), "version 2 was rolled back to 2, but these"),
        (edit(lambda c: c["events"][2].update(when="yesterday")), "events.2.rolled back.when: "),
        (edit(lambda c: c["events"].pop(1)), "version 2 was rolled back to 1, but these were not"),
        (edit(lambda c: c["events"].append(c["events"][2])), "rolled back to 1, but these were"),
        (
            edit(lambda c: rules_of(c, 0).clear()),
            "version 1 was promoted, but its parity",
        ),
        (
            edit(lambda c: rules_of(c, 0)["parity"].update(passed=False)),
            "version 1 is champion, but has no parity",
        ),
    ],
)
def test_broken_ledger_is_a_user_error(
    tmp_path: Path, damage: Callable[[str], str], complaint: str
) -> None:
    path = tmp_path / "registry.json"
    of(2, 1, 2).with_event(rolled_back(2, to=1)).save(path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="git checkout ") as refusal:
        Ledger.load(path)
    assert str(refusal.value).startswith(f"{path} ")
    assert complaint in str(refusal.value)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("command", [["promote", "2"], ["rollback"]])
def test_broken_ledger_ends_the_command_and_is_kept(mnist_bn: MnistBn, command: list[str]) -> None:
    REGISTRY.parent.mkdir()
    REGISTRY.write_text("[]")
    done = mnist_bn(*command)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: models/registry.json is not a ledger: the file: ")
    assert REGISTRY.read_text() == "[]"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "registry.json"
    of(2, 1, 2).with_event(rolled_back(2, to=1)).save(path)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 200))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + length :])
    try:
        ledger = Ledger.load(path)
    except UserError as error:
        assert "git checkout" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert ledger.previous_champions is not None


def test_unreadable_ledger_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Ledger.load(tmp_path)


# --- trouble while writing ----------------------------------------------------------------------


def test_full_disk_leaves_the_old_ledger(tmp_path: Path, small_disk: int) -> None:
    path = tmp_path / "registry.json"
    of(1, 1).save(path)
    before = path.read_bytes()
    assert len(before) < small_disk
    with pytest.raises(OSError, match="File too large"):
        of(1, 1).with_version(measured(1, tuple(range(500))), REFUSED).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["registry.json"]


ADD_FIVE = """
import sys
from pathlib import Path
from mnist_batchnorm.artifacts.registry_file import Ledger, locked
from tests.artifacts.test_registry_file import REFUSED, measured
path = Path(sys.argv[1])
for seed in range(5):
    with locked(path):
        ledger = Ledger.load(path)
        ledger.with_version(measured(5 * int(sys.argv[2]) + seed), REFUSED).save(path)
"""


def test_nobodys_version_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD_FIVE, str(path), str(i)],
            cwd=Path(__file__).parents[2],
        )
        for i in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    ledger = Ledger.load(path)
    assert {ledger.number_of(measured(seed).files) for seed in range(10)} == set(range(1, 11))


def test_ledger_that_stays_locked_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.05)
    with (
        FileLock(tmp_path / module.LOCK),
        pytest.raises(UserError, match="being changed by another process"),
        locked(tmp_path / "registry.json"),
    ):
        pass


def test_a_champion_that_is_promoted_again_does_not_precede_itself() -> None:
    """As the events of two branches do after a merge."""
    ledger = of(2, 1, 2)
    again = Ledger(versions=ledger.versions, events=(*ledger.events, PromotedByRules(version=2)))
    assert [version.version for version in again.previous_champions] == [1]
