"""Stage register: who becomes champion, who does not and why, and the same bytes every time."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from mnist_batchnorm.artifacts.goldens import GOLDEN_FILES, GOLDEN_IMAGES
from mnist_batchnorm.artifacts.splits import load_split, network_input, save_split
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import (
    CHECKPOINT,
    MODELS,
    PROMOTION,
    REGISTERED,
    REGISTRY,
    TEST_SPLIT,
)
from mnist_batchnorm.parity import Check, runtime
from tests.conftest import MnistBn
from tests.support.candidates import (
    ALIKE,
    BAD,
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
    state,
)
from tests.support.finished import PASSED, write_parity

PARITY = Path("reports/parity.json")


@pytest.fixture
def folder(project: Path, prepared: Path) -> Path:
    """A good network has been exported and verified, and nothing was ever registered."""
    prepare_folder(project, prepared)
    lay(GOOD)
    return project


@pytest.fixture
def second(folder: Path, mnist_bn: MnistBn) -> Path:
    """The good network is champion; another, as good, has been exported and verified."""
    assert mnist_bn("register").status == 0
    assert champion() == 1
    lay(shifted(ALIKE))
    return folder


def rewrap(file: str) -> None:
    """Make an ONNX file another one that computes the same."""
    proto = onnx.load(MODELS / file)
    proto.producer_name = "another exporter"
    onnx.save(proto, MODELS / file)


# --- good ones ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_first_good_one_becomes_champion(mnist_bn: MnistBn) -> None:
    done = mnist_bn("register")
    assert (done.status, done.err) == (0, "")
    first, *rules, last = done.out.splitlines()
    assert (first, last) == ("version 1: promoted", "champion: version 1")
    assert [rule.split()[:2] for rule in rules] == [
        ["ok", name] for name in ("parity", "accuracy", "champion", "goldens", "rollback")
    ]
    assert champion() == 1
    assert [event.model_dump() for event in ledger().events] == [
        {"event": "promoted", "version": 1, "by": "rules"}
    ]


@pytest.mark.usefixtures("folder")
def test_version_holds_what_the_files_give(mnist_bn: MnistBn) -> None:
    mnist_bn("register")
    (version,) = ledger().versions
    test = load_split(TEST_SPLIT)
    assert version.weights_sha256 == digest(CHECKPOINT)
    assert (version.test_sha256, version.test_images) == (digest(TEST_SPLIT), 500)
    for name, file in REGISTERED.items():
        path = MODELS / file
        assert version.files[name].sha256 == digest(path)
        assert version.files[name].md5 == digest(path, "md5")
        logits = runtime.load(path.read_bytes()).run(network_input(test.images))
        wrong = test.index[logits.argmax(axis=1) != test.labels]
        assert list(version.errors[name]) == wrong.tolist()
        assert version.accuracy(name) == 1 - len(wrong) / 500 == 0.948


@pytest.mark.usefixtures("second")
def test_one_as_good_replaces_the_champion(mnist_bn: MnistBn) -> None:
    assert mnist_bn("register").out.startswith("version 2: promoted\n")
    assert champion() == 2
    assert [version.version for version in ledger().previous_champions] == [1]
    assert promotion()["rules"]["champion"]["numbers"] == {
        "version": 1,
        "alpha": 0.05,
        **{
            name: {"only_champion_right": 2, "only_candidate_right": 0, "p": 0.25}
            for name in REGISTERED
        },
    }


@pytest.mark.usefixtures("second")
def test_promotion_is_what_the_ledger_says_about_the_version(mnist_bn: MnistBn) -> None:
    mnist_bn("register")
    version = json.loads(REGISTRY.read_text())["versions"][1]
    del version["errors"]
    assert promotion() == {"schema": 1, **version.pop("decision"), **version}


@pytest.mark.parametrize("spoil", ["fails", "is missing", "is not in the report"])
def test_plain_is_no_candidate_and_refuses_none(
    folder: Path, mnist_bn: MnistBn, spoil: str
) -> None:
    """A plain.onnx that fails stops stage verify; it says nothing against the others."""
    if spoil == "fails":
        write_parity(folder, [Check("probes", "failed", "8.1 of 8 sigma")], about="plain.onnx")
        assert json.loads(PARITY.read_text())["parity"] is False
    elif spoil == "is missing":
        (MODELS / "plain.onnx").unlink()
    else:
        report = json.loads(PARITY.read_text())
        del report["graphs"]["plain.onnx"]
        PARITY.write_text(json.dumps(report))
    assert mnist_bn("register").status == 0
    assert (promotion()["outcome"], champion(), refusals()) == ("promoted", 1, set())
    assert promotion()["files"].keys() == REGISTERED.keys()


# --- bad ones, each refused by its rule and no other ---------------------------------------------


def no_parity(_: Path) -> None:
    lay(shifted(ALIKE))
    write_parity(Path(), [Check("weights", "failed", "bn1.running_mean differs")])


def parity_of_another_file(_: Path) -> None:
    lay(shifted(ALIKE))
    rewrap("bn-folded.onnx")


def parity_of_other_weights(_: Path) -> None:
    lay(shifted(ALIKE))
    CHECKPOINT.write_bytes(b"trained again")


def parity_never_judged(_: Path) -> None:
    lay(shifted(ALIKE))
    PARITY.unlink()


def parity_unreadable(_: Path) -> None:
    lay(shifted(ALIKE))
    PARITY.write_text(PARITY.read_text()[:500])


def parity_of_one_file_only(_: Path) -> None:
    lay(shifted(ALIKE))
    report = json.loads(PARITY.read_text())
    del report["graphs"]["bn-folded.onnx"]
    PARITY.write_text(json.dumps(report))


def parity_of_an_older_gate(_: Path) -> None:
    lay(shifted(ALIKE))
    report = json.loads(PARITY.read_text())
    for graph in report["graphs"].values():
        graph["checks"] = [check for check in graph["checks"] if check["name"] != "probes"]
    PARITY.write_text(json.dumps(report))


def parity_on_other_images(_: Path) -> None:
    lay(shifted(ALIKE))
    report = json.loads(PARITY.read_text())
    report["data"]["sha256"] = "0" * 64
    PARITY.write_text(json.dumps(report))


def parity_denied_at_the_top(_: Path) -> None:
    lay(shifted(ALIKE))
    PARITY.write_text(json.dumps(json.loads(PARITY.read_text()) | {"parity": False}))


def below_the_floor(folder: Path) -> None:
    lay(shifted(ALIKE))
    demand(folder, min_accuracy=0.947)  # 0.944 of 500, 0.948 the champion's


def worse(_: Path) -> None:
    lay(shifted(WORSE))


def one_file_worse(_: Path) -> None:
    """Only for the folded file: goldens and the gate cannot have been asked about it."""
    (MODELS / "bn-folded.onnx").write_bytes(shifted(WORSE).graph(folded=True))
    write_parity(Path(), PASSED)


def goldens_off(_: Path) -> None:
    lay(shifted(ALIKE / 2), pin=False)


def goldens_missing(_: Path) -> None:
    lay(shifted(ALIKE))
    GOLDEN_FILES["bn"].unlink()


def goldens_unreadable(_: Path) -> None:
    lay(shifted(ALIKE))
    GOLDEN_FILES["bn"].write_text("{}")


def images_of_the_goldens_missing(_: Path) -> None:
    lay(shifted(ALIKE))
    GOLDEN_IMAGES.unlink()


def key_missing(folder: Path) -> None:
    lay(shifted(ALIKE))
    demand(folder, signed_by="release.pub")


@pytest.mark.parametrize(
    ("spoil", "rules", "says"),
    [
        (no_parity, "parity", r"no parity: bn\.onnx: weights; `dvc repro verify` shows"),
        (parity_of_another_file, "parity", r"about a models/bn-folded\.onnx with SHA-256 "),
        (parity_of_other_weights, "parity", r"about a models/bn\.safetensors with SHA-256 "),
        (parity_never_judged, "parity", r"no reports/parity\.json; run `dvc repro verify` first"),
        (parity_unreadable, "parity", r"parity\.json is not what `dvc repro verify` writes"),
        (parity_of_one_file_only, "parity", r"says nothing about models/bn-folded\.onnx"),
        (parity_of_an_older_gate, "parity", r"is not of today's gate: its checks are file, prov"),
        (
            parity_on_other_images,
            "parity",
            r"test\.safetensors with SHA-256 0{12}…, but the test im",
        ),
        (parity_denied_at_the_top, "parity", r"no parity: reports/parity\.json"),
        (below_the_floor, "accuracy", r"0\.9440 and 0\.9440 of 500 .* demanded are 0\.947"),
        (worse, "champion", r"worse than version 1, .* 18 wrong that it gets right, p = 3\.8e-06"),
        (one_file_worse, "champion goldens", r"worse than version 1"),
        (goldens_off, "goldens", r"differ from .* for 64 of 64 images, .* `mnist-bn regress --upd"),
        (
            goldens_missing,
            "goldens",
            r"no outputs have been pinned yet; `mnist-bn regress --update",
        ),
        (goldens_unreadable, "goldens", r"goldens/bn\.json holds no goldens"),
        (images_of_the_goldens_missing, "goldens", r"no goldens/images\.safetensors"),
        (key_missing, "signature", r"no release\.pub, the public key that register\.signed_by"),
    ],
)
def test_bad_one_is_refused_by_its_rule(
    second: Path, mnist_bn: MnistBn, spoil: Callable[[Path], None], rules: str, says: str
) -> None:
    spoil(second)
    done = mnist_bn("register")
    assert (done.status, done.err) == (0, "")
    assert refusals() == set(rules.split())
    assert done.out.startswith("version 2: refused\n")
    assert done.out.endswith("champion: version 1\n")
    shown = " ".join(done.out.split())
    for name in rules.split():
        sentence = promotion()["rules"][name]["says"]
        assert f"REFUSED {name} {sentence}" in shown
    assert any(re.search(says, promotion()["rules"][name]["says"]) for name in rules.split())
    assert champion() == 1
    assert len(ledger().versions) == 2
    assert not any(str(second).encode() in content for content in state())


def test_checkpoint_that_is_not_the_versions_does_not_take_its_place(
    folder: Path, mnist_bn: MnistBn
) -> None:
    assert folder
    mnist_bn("register")
    weights = ledger().versions[0].weights_sha256
    CHECKPOINT.write_bytes(b"trained again, not exported")
    mnist_bn("register")
    assert (promotion()["outcome"], refusals()) == ("kept", {"parity"})
    assert ledger().versions[0].weights_sha256 == weights


def test_ledger_that_git_has_is_not_begun_anew(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist_bn("register")
    (folder / "dvc.yaml").write_text("stages: {}")
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@localhost")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "registered"]):
        subprocess.run(["git", *command], check=True)
    REGISTRY.unlink()
    lay(shifted(WORSE))
    done = mnist_bn("register")
    assert done.status == 2
    assert "models/registry.json is gone, but git has it" in done.err
    assert not REGISTRY.exists()


def test_signature_is_asked_for_where_one_is_demanded(
    second: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, Path]] = []
    problems = iter(["models/ has no signature", None])

    def signature_problem(models: Path, public_key: Path) -> str | None:
        asked.append((models, public_key))
        return next(problems)

    monkeypatch.setattr("mnist_batchnorm.signing.signer.signature_problem", signature_problem)
    (second / "release.pub").write_bytes(b"a public key")
    demand(second, signed_by="release.pub")
    mnist_bn("register")
    assert asked == [(MODELS, Path("release.pub"))]
    assert refusals() == {"signature"}
    assert promotion()["rules"]["signature"] == {
        "passed": False,
        "says": "models/ has no signature",
        "numbers": {"key_sha256": digest(Path("release.pub"))},
    }
    assert champion() == 1
    mnist_bn("register")  # signed meanwhile
    assert (promotion()["outcome"], champion()) == ("promoted", 2)


def test_signed_files_are_promoted_and_others_are_not(second: Path, mnist_bn: MnistBn) -> None:
    (MODELS / "plain.safetensors").write_bytes(b"the other network")
    assert mnist_bn("sign", "--new-key", "release.pem").status == 0
    demand(second, signed_by="release.pub.pem")
    mnist_bn("register")
    assert (promotion()["outcome"], champion()) == ("promoted", 2)
    lay(shifted(0.01))  # other bytes under the old signature
    mnist_bn("register")
    assert refusals() == {"signature"}
    assert champion() == 2
    assert mnist_bn("sign", "--new-key", "somebody.pem").status == 0
    mnist_bn("register")
    assert refusals() == {"signature"}  # by another's key
    assert mnist_bn("sign", "--key", "release.pem").status == 0
    mnist_bn("register")
    assert (promotion()["outcome"], champion()) == ("promoted", 3)


@pytest.mark.usefixtures("folder")
def test_rules_are_all_judged_and_all_said(mnist_bn: MnistBn, folder: Path) -> None:
    mnist_bn("register")
    lay(shifted(BAD), pin=False)
    PARITY.unlink()
    done = mnist_bn("register", "--require")
    assert done.status == 1
    assert refusals() == {"parity", "accuracy", "champion", "goldens"}
    for name in refusals():
        assert f"{name}: {promotion()['rules'][name]['says']}" in done.err


@pytest.mark.usefixtures("folder")
def test_without_a_champion_a_bad_one_is_still_refused(mnist_bn: MnistBn) -> None:
    lay(shifted(BAD))
    done = mnist_bn("register")
    assert (done.status, refusals()) == (0, {"accuracy"})
    assert done.out.endswith("no champion yet\n")


def test_other_test_images_cannot_be_compared(second: Path, mnist_bn: MnistBn) -> None:
    test = load_split(TEST_SPLIT)
    test.images[0, 0, 0] ^= 1
    save_split(TEST_SPLIT, test)
    write_parity(Path(), PASSED)
    mnist_bn("register")
    assert refusals() == {"champion"}
    assert '`mnist-bn promote 2 --override "reason"`' in promotion()["rules"]["champion"]["says"]
    # the champion's files are measured on the new images, and then the candidate can be compared
    lay(GOOD)
    mnist_bn("register")
    assert (promotion()["version"], promotion()["outcome"]) == (1, "promoted")
    lay(shifted(ALIKE))
    mnist_bn("register")
    assert (promotion()["version"], promotion()["outcome"]) == (2, "promoted")


# --- the same again -----------------------------------------------------------------------------


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("by", [ALIKE, WORSE])
def test_again_writes_the_same_bytes(mnist_bn: MnistBn, by: float) -> None:
    lay(shifted(by))
    first = mnist_bn("register")
    before = state()
    assert mnist_bn("register") == first
    assert state() == before
    PROMOTION.unlink()  # as DVC does before a stage
    mnist_bn("register")
    assert state() == before


@pytest.mark.usefixtures("second")
def test_elsewhere_the_same_history_gives_the_same_bytes(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist_bn("register")
    before = state()
    REGISTRY.unlink()
    monkeypatch.setenv("GIT_CONFIG_COUNT", "0")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    for by in (0, ALIKE):
        lay(shifted(by))
        mnist_bn("register")
    assert state() == before


@pytest.mark.usefixtures("second")
def test_files_that_were_rolled_back_stay_back(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_batchnorm.mlflow_sync.sync.show_registry", lambda: None)
    mnist_bn("register")
    assert mnist_bn("rollback").status == 0
    mnist_bn("register")
    assert refusals() == {"rollback"}
    assert (promotion()["outcome"], champion()) == ("refused", 1)
    before = state()
    mnist_bn("register")
    assert state() == before


@pytest.mark.usefixtures("second")
def test_old_files_are_the_old_version(mnist_bn: MnistBn) -> None:
    mnist_bn("register")
    lay(GOOD)
    mnist_bn("register")
    assert promotion()["version"] == 1
    assert len(ledger().versions) == 2


def test_stricter_rules_demote_nobody(folder: Path, mnist_bn: MnistBn) -> None:
    mnist_bn("register")
    demand(folder, min_accuracy=0.99)
    done = mnist_bn("register", "--require")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("version 1: kept\n")
    assert (promotion()["outcome"], refusals(), champion()) == ("kept", {"accuracy"}, 1)


@pytest.mark.parametrize(("by", "status"), [(ALIKE, 0), (WORSE, 1)])
@pytest.mark.usefixtures("second")
def test_require_fails_where_it_is_not_champion(mnist_bn: MnistBn, by: float, status: int) -> None:
    lay(shifted(by))
    done = mnist_bn("register", "--require")
    assert done.status == status
    assert done.err.startswith("FAILED: version 2 is not the champion: champion: ") == (status == 1)


# --- what cannot be judged ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "stage"),
    [(TEST_SPLIT, "prepare"), (CHECKPOINT, "train"), (MODELS / "bn.onnx", "export")],
)
@pytest.mark.usefixtures("folder")
def test_missing_input_names_the_stage(mnist_bn: MnistBn, missing: Path, stage: str) -> None:
    missing.unlink()
    done = mnist_bn("register")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: no {missing}; run `dvc repro {stage}` first\n"
    assert not REGISTRY.exists()
    assert not PROMOTION.exists()


@pytest.mark.usefixtures("second")
def test_file_without_logits_is_no_version(mnist_bn: MnistBn) -> None:
    before = state()
    lay(shifted(ALIKE), pin=False)
    (MODELS / "bn.onnx").write_bytes(shifted(float("nan")).graph(folded=False))
    done = mnist_bn("register")
    assert done.status == 1
    assert "models/bn.onnx gives NaN or infinite logits" in done.err
    assert state() == before


# --- trouble while writing ----------------------------------------------------------------------

COMMAND = "from mnist_batchnorm.cli import main; main()"
DIES_AT_THE_RENAME = """
import os, pathlib, signal
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("second")
def test_killed_write_leaves_the_old_ledger(mnist_bn: MnistBn) -> None:
    before = state()
    done = subprocess.run(
        [sys.executable, "-c", DIES_AT_THE_RENAME + COMMAND, "register"], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert state() == before
    assert mnist_bn("register").status == 0  # nothing is locked
    assert champion() == 2


@pytest.mark.usefixtures("second")
def test_two_at_once_register_one_version(mnist_bn: MnistBn) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", COMMAND, "register"], stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    after = state()
    assert [version.version for version in ledger().versions] == [1, 2]
    assert len(ledger().events) == 2
    mnist_bn("register")
    assert state() == after


@pytest.mark.usefixtures("folder")
def test_imports_nothing_heavy() -> None:
    script = f"""
import sys
try:
    {COMMAND}
finally:
    print([m for m in ("torch", "mlflow", "onnx", "matplotlib", "dvc") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "register"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_lock_file_is_none_of_gits(folder: Path, mnist_bn: MnistBn) -> None:
    root = Path(__file__).parents[2]
    (folder / ".gitignore").write_bytes((root / ".gitignore").read_bytes())
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", "init", "-q"], check=True, env=environment)
    mnist_bn("register")
    (MODELS / ".registry.lock").touch()
    done = subprocess.run(
        ["git", "status", "--porcelain", "-uall", "models"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout == "?? models/registry.json\n"
