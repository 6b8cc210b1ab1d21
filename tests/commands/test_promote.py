"""`mnist-bn promote` and `mnist-bn rollback`: a person moves the champion."""

import json
import re
from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.goldens import GOLDEN_FILES
from mnist_batchnorm.commands import champion as champion_command
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTRY, TEST_SPLIT
from mnist_batchnorm.parity import Check
from tests.conftest import MnistBn
from tests.support.candidates import (
    ALIKE,
    GOOD,
    WORSE,
    champion,
    demand,
    lay,
    ledger,
    prepare_folder,
    promotion,
    refusals,
    shifted,
)
from tests.support.finished import PASSED, write_parity

NOW = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The champion each time that MLflow is told; test_registry.py has the real thing."""
    told: list[int | None] = []
    monkeypatch.setattr(
        "mnist_batchnorm.mlflow_sync.sync.show_registry", lambda: told.append(champion())
    )
    return told


@pytest.fixture
def folder(
    project: Path, prepared: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Version 1 is champion, 2 was refused as worse, and the files of 2 are in models/."""
    prepare_folder(project, prepared)
    for key, value in {"user.name": "A. Person", "user.email": "a@example.org"}.items():
        set_git(monkeypatch, key, value)
    for by in (0, WORSE):
        lay(shifted(by))
        mnist_bn("register")
    assert champion() == 1
    assert refusals() == {"champion"}
    return project


def set_git(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    """Set git's configuration for this process and its children only."""
    places = {"user.name": 0, "user.email": 1}
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    monkeypatch.setenv(f"GIT_CONFIG_KEY_{places[key]}", key)
    monkeypatch.setenv(f"GIT_CONFIG_VALUE_{places[key]}", value)


def clear() -> None:
    """Delete the files that versions are made of."""
    for path in (*MODELS.glob("*.onnx"), CHECKPOINT):
        path.unlink()


# --- by the rules -------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("present", [True, False])
def test_refused_version_is_refused_again(mnist_bn: MnistBn, present: bool) -> None:
    if not present:
        clear()
    before = REGISTRY.read_bytes()
    done = mnist_bn("promote", "2")
    assert done.status == 1
    assert done.err.startswith("FAILED: version 2 is not promoted: champion: worse than version 1")
    assert "REFUSED  champion" in done.out
    assert REGISTRY.read_bytes() == before


def test_rules_of_today_decide_not_those_of_then(folder: Path, mnist_bn: MnistBn) -> None:
    demand(folder, alpha=1e-9)
    clear()
    done = mnist_bn("promote", "2")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("\nchampion: version 2\n")
    assert champion() == 2
    assert ledger().versions[1].decision.outcome == "promoted"
    assert ledger().events[-1].model_dump() == {"event": "promoted", "version": 2, "by": "rules"}
    demand(folder, min_accuracy=0.96)
    assert mnist_bn("promote", "1").err.startswith("FAILED: version 1 is not promoted: accuracy: ")


@pytest.mark.usefixtures("folder")
def test_champion_of_today_is_the_one_to_beat(mnist_bn: MnistBn, shown: list[int | None]) -> None:
    mnist_bn("promote", "2", "--override", "to try it")
    assert mnist_bn("promote", "1").status == 0
    assert champion() == 1
    assert shown == [2, 1]
    rule = ledger().versions[0].decision.rules["champion"]
    assert rule.numbers["version"] == 2


@pytest.mark.usefixtures("folder")
def test_present_files_are_judged_themselves(mnist_bn: MnistBn) -> None:
    lay(shifted(ALIKE))
    write_parity(Path(), [Check("probes", "failed", "differs")])
    mnist_bn("register")
    assert refusals() == {"parity"}
    write_parity(Path(), PASSED)  # the gate has been run again since
    assert mnist_bn("promote", "3").status == 0
    assert champion() == 3
    assert ledger().versions[2].decision.rules["parity"].passed


@pytest.mark.usefixtures("folder")
def test_absent_files_are_judged_by_what_was_recorded(mnist_bn: MnistBn) -> None:
    lay(shifted(ALIKE))
    GOLDEN_FILES["bn"].unlink()
    mnist_bn("register")
    lay(GOOD)  # with goldens, and a gate's verdict about these files
    done = mnist_bn("promote", "3")
    assert done.status == 1
    assert done.err.startswith("FAILED: version 3 is not promoted: goldens: no goldens/")
    TEST_SPLIT.unlink()  # nor are the test images needed
    assert mnist_bn("promote", "3") == done


def test_signature_that_nobody_checked_is_refused(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_batchnorm.signing.signer.signature_problem", lambda *_: None)
    demand(folder, alpha=1e-9)
    keys = {name: folder / name for name in ("old.pub", "new.pub")}
    for name, path in keys.items():
        path.write_text(name)
    demand(folder, signed_by="new.pub")
    lay(GOOD)
    done = mnist_bn("promote", "2")
    assert done.err.startswith("FAILED: version 2 is not promoted: signature: version 2 was not ")
    lay(shifted(WORSE))
    demand(folder, signed_by="old.pub")
    GOLDEN_FILES["bn"].unlink()
    mnist_bn("register")
    assert refusals() == {"goldens"}
    lay(GOOD)
    demand(folder, signed_by="new.pub")
    assert (
        "signature: version 2 was not checked with the key new.pub" in mnist_bn("promote", "2").err
    )
    demand(folder, signed_by="old.pub")
    assert "signature" not in mnist_bn("promote", "2").err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("override", [[], ["--override", "because"]])
def test_champion_stays_champion(mnist_bn: MnistBn, override: list[str]) -> None:
    before = REGISTRY.read_bytes()
    done = mnist_bn("promote", "1", *override)
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("\nchampion: version 1\n")
    assert REGISTRY.read_bytes() == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("number", ["0", "3", "-1"])
def test_unknown_version_lists_those_there_are(mnist_bn: MnistBn, number: str) -> None:
    done = mnist_bn("promote", "--", number)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: no version {number} in models/registry.json; there are: 1, 2\n"


@pytest.mark.usefixtures("folder")
def test_json_is_all_of_stdout(mnist_bn: MnistBn) -> None:
    done = mnist_bn("promote", "2", "--json")
    assert done.status == 1
    content = json.loads(done.out)
    assert (content["version"], content["champion"]) == (2, 1)
    assert content["rules"] == promotion()["rules"]
    done = mnist_bn("promote", "2", "--json", "--override", "because")
    assert (done.status, done.err) == (0, "champion: version 2\n")
    assert json.loads(done.out)["champion"] == 2


# --- override -----------------------------------------------------------------------------------


def spoil(folder: Path, rule: str, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a version 3 that one rule refuses."""
    lay(shifted(ALIKE) if rule != "champion" else shifted(WORSE + 0.1))
    match rule:
        case "accuracy":
            demand(folder, min_accuracy=0.947)
        case "goldens":
            GOLDEN_FILES["bn"].write_text("")
        case "signature":
            monkeypatch.setattr(
                "mnist_batchnorm.signing.signer.signature_problem", lambda *_: "unsigned"
            )
            (folder / "release.pub").touch()
            demand(folder, signed_by="release.pub")
        case "rollback":
            mnist_bn("register")
            mnist_bn("rollback")
    mnist_bn("register")
    assert refusals() == {rule}


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("rule", ["accuracy", "champion", "goldens", "signature", "rollback"])
def test_override_overrides(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, rule: str, present: bool
) -> None:
    spoil(folder, rule, mnist_bn, monkeypatch)
    if not present:
        clear()
    assert mnist_bn("promote", "3").status == 1
    assert champion() == 1
    done = mnist_bn("promote", "3", "--override", "  the old one\nis worse still ")
    assert (done.status, done.err) == (0, "")
    assert f"REFUSED  {rule}" in done.out
    assert done.out.endswith("\nchampion: version 3\n")
    event = ledger().events[-1].model_dump()
    assert NOW.fullmatch(event.pop("when"))
    assert event == {
        "event": "promoted",
        "version": 3,
        "by": "override",
        "who": "A. Person <a@example.org>",
        "why": "the old one is worse still",
    }


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("present", [True, False])
def test_nothing_overrides_parity(mnist_bn: MnistBn, present: bool) -> None:
    lay(shifted(ALIKE))
    write_parity(Path(), [Check("probes", "failed", "differs")])
    mnist_bn("register")
    if not present:
        clear()
    before = REGISTRY.read_bytes()
    done = mnist_bn("promote", "3", "--override", "I know better")
    assert done.status == 1
    assert done.err.startswith("FAILED: nothing overrides parity: no parity: bn.onnx: probes")
    assert REGISTRY.read_bytes() == before


@pytest.mark.usefixtures("folder")
def test_rollback_does_not_bring_back_what_has_no_parity(mnist_bn: MnistBn) -> None:
    mnist_bn("promote", "2", "--override", "to try it")
    lay(GOOD)  # the files of version 1
    write_parity(Path(), [Check("probes", "failed", "differs")])
    mnist_bn("register")
    before = REGISTRY.read_bytes()
    done = mnist_bn("rollback")
    assert done.status == 1
    assert "FAILED: version 1 does not come back: parity: no parity" in done.err
    assert REGISTRY.read_bytes() == before


@pytest.mark.usefixtures("folder")
def test_reason_has_its_limit(mnist_bn: MnistBn) -> None:
    done = mnist_bn("promote", "2", "--override", "word " * 200)
    assert done.status == 2
    assert "a reason of 999 characters is too long; at most 500" in done.err
    assert champion() == 1


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("reason", ["", " \n"])
def test_override_needs_a_reason(mnist_bn: MnistBn, reason: str) -> None:
    done = mnist_bn("promote", "2", "--override", reason)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: --override needs a reason")
    assert champion() == 1


@pytest.mark.usefixtures("folder")
def test_version_of_an_override_is_kept_by_the_stage(mnist_bn: MnistBn) -> None:
    mnist_bn("promote", "2", "--override", "because")
    done = mnist_bn("register", "--require")
    assert done.status == 0
    assert done.out.startswith("version 2: kept\n")
    assert (promotion()["outcome"], refusals(), champion()) == ("kept", {"champion"}, 2)
    assert len(ledger().events) == 2


# --- rollback -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_rollback_puts_the_last_champion_back(mnist_bn: MnistBn) -> None:
    mnist_bn("promote", "2", "--override", "because")
    lay(shifted(ALIKE))
    mnist_bn("register")
    assert champion() == 3
    done = mnist_bn("rollback", "--reason", "complaints")
    assert (done.status, done.err) == (0, "")
    assert done.out == "version 3 rolled back\nchampion: version 2\n"
    assert mnist_bn("rollback").out == "version 2 rolled back\nchampion: version 1\n"
    *_, first, second = (event.model_dump() for event in ledger().events)
    assert NOW.fullmatch(first.pop("when"))
    assert first == {
        "event": "rolled back",
        "version": 3,
        "to": 2,
        "who": "A. Person <a@example.org>",
        "why": "complaints",
    }
    assert second["why"] is None


@pytest.mark.usefixtures("folder")
def test_there_may_be_nothing_to_roll_back_to(mnist_bn: MnistBn) -> None:
    before = REGISTRY.read_bytes()
    done = mnist_bn("rollback")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "error: champion: version 1, and there was none before: nothing to roll back to\n"
    )
    assert REGISTRY.read_bytes() == before


@pytest.mark.usefixtures("folder")
def test_what_was_rolled_back_is_promoted_by_override_only(mnist_bn: MnistBn) -> None:
    lay(shifted(ALIKE))
    mnist_bn("register")
    mnist_bn("rollback")
    mnist_bn("register")
    assert champion() == 1
    assert mnist_bn("promote", "3").err.startswith(
        "FAILED: version 3 is not promoted: rollback: version 3 was rolled back: only `mnist-bn "
    )
    mnist_bn("promote", "3", "--override", "it was not the model after all")
    assert champion() == 3
    assert mnist_bn("register").out.startswith("version 3: kept\n")


# --- who ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "email", "who"),
    [
        ("A. Person", "a@example.org", "A. Person <a@example.org>"),
        ("Zoë", "", "Zoë"),
        ("", "a@example.org", "<a@example.org>"),
        ("", "", "login"),
    ],
)
def test_who_is_gits_user_or_the_account(
    monkeypatch: pytest.MonkeyPatch, name: str, email: str, who: str
) -> None:
    monkeypatch.setenv("LOGNAME", "login")
    set_git(monkeypatch, "user.name", name)
    set_git(monkeypatch, "user.email", email)
    assert champion_command.current_person() == who


def test_who_is_unknown_where_there_is_neither_git_nor_an_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("getpass.getuser", nobody)
    assert champion_command.current_person() == "unknown"


def test_words_that_are_no_text_can_be_written() -> None:
    assert champion_command.to_one_line("caf\udce9 \n noir") == "caf? noir"


def test_registry_must_be_there(project: Path) -> None:
    with pytest.raises(UserError, match=r"no models/registry\.json in .*; run `dvc repro regist"):
        champion_command.require_registry()
    assert [path.name for path in project.iterdir()] == ["params.yaml"]
