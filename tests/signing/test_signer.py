"""`mnist-bn sign` and `verify-signature`: which signatures are valid, and which are not."""

import base64
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_signing import hashing, signing

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.signer import IGNORED_FILES, SIGNED_FILES, sign, signature_problem
from mnist_batchnorm.signing.signer import SIGNATURE as SIGNATURE_NAME
from tests.conftest import ROOT, MnistBn, Outcome

SIGNATURE = MODELS / SIGNATURE_NAME


def reference_program(*arguments: object) -> tuple[int, str]:
    """Run ``model_signing``, the program of model signing, in this process."""
    from model_signing import _cli as reference

    done = CliRunner().invoke(reference.main, [str(argument) for argument in arguments])
    return done.exit_code, done.output


# --- what holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["ours", "p384", "p521"])
def test_what_was_signed_holds(models: Path, mnist_bn: MnistBn, keys: Path, curve: str) -> None:
    done = mnist_bn("sign", "--key", str(keys / f"{curve}.pem"))
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{SIGNATURE}: signed {', '.join(SIGNED_FILES)}\n"
    done = mnist_bn("verify-signature", "--key", str(keys / f"{curve}.pub.pem"))
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{SIGNATURE} holds: bn.onnx, ")
    assert signature_problem(models, keys / f"{curve}.pub.pem") is None


def test_one_manifest_covers_what_the_pipeline_ships_and_nothing_else(signed: Path) -> None:
    envelope = json.loads((signed / SIGNATURE_NAME).read_text())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    names = [resource["name"] for resource in statement["predicate"]["resources"]]
    assert sorted(names) == [
        *("bn-folded.onnx", "bn.onnx", "bn.safetensors"),
        *("plain.onnx", "plain.safetensors"),
    ]


def test_other_files_may_come_and_change(signed: Path, verify: Callable[[], Outcome]) -> None:
    (signed / "registry.json").write_text("{}")
    (signed / "README.md").write_text("# Other\n")
    (signed / ".gitignore").unlink()
    (signed / ".bn.onnx.0123456789abcdef.tmp").write_text("left by a killed write")
    (signed / "folder.onnx").mkdir()
    assert verify().status == 0


def test_links_into_dvcs_cache_are_signed_by_their_bytes(
    models: Path, mnist_bn: MnistBn, keys: Path, verify: Callable[[], Outcome], project: Path
) -> None:
    cached = project / "cached"
    (models / "bn.onnx").rename(cached)
    (models / "bn.onnx").symlink_to(cached)
    assert mnist_bn("sign", "--key", str(keys / "ours.pem")).status == 0
    assert verify().status == 0
    cached.write_bytes(b"other")
    assert verify().err == f"FAILED: {SIGNATURE} does not hold: bn.onnx was changed\n"


def test_signing_again_replaces_the_signature(signed: Path, mnist_bn: MnistBn, keys: Path) -> None:
    (signed / "bn.onnx").write_bytes(b"retrained")
    assert mnist_bn("sign", "--key", str(keys / "other.pem")).status == 0
    assert signature_problem(signed, keys / "other.pub.pem") is None


def test_signature_belongs_into_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def ignored(*paths: str) -> set[str]:
        done = subprocess.run(
            ["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    assert ignored(str(SIGNATURE), "key.pem", "key.pub.pem", "a/key.pem") == {
        "key.pem",
        "a/key.pem",
    }


# --- what does not ------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", SIGNED_FILES)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (Path.unlink, "is missing"),
        (truncate, "was changed"),
        (lambda path: path.write_bytes(b""), "was changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "was changed"),
    ],
    ids=["missing", "truncated", "empty", "longer"],
)
def test_each_file_is_covered(
    signed: Path,
    verify: Callable[[], Outcome],
    name: str,
    damage: Callable[[Path], object],
    complaint: str,
) -> None:
    damage(signed / name)
    done = verify()
    assert (done.status, done.out) == (1, "")
    assert done.err == f"FAILED: {SIGNATURE} does not hold: {name} {complaint}\n"


@settings(max_examples=100)
@given(name=st.sampled_from(SIGNED_FILES), place=st.integers(0, 39), change=st.integers(1, 255))
def test_any_single_changed_byte_is_found(
    shelf: Path, keys: Path, name: str, place: int, change: int
) -> None:
    path = shelf / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= change
    path.write_bytes(damaged)
    try:
        problem = signature_problem(shelf, keys / "ours.pub.pem")
    finally:
        path.write_bytes(whole)
    assert problem == f"{shelf / SIGNATURE_NAME} does not hold: {name} was changed"


def test_files_that_changed_places_are_found(signed: Path, verify: Callable[[], Outcome]) -> None:
    first, second = signed / "bn.onnx", signed / "bn-folded.onnx"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    done = verify()
    assert done.status == 1
    assert "bn-folded.onnx was changed; bn.onnx was changed" in done.err


@pytest.mark.parametrize("name", ["new.onnx", "NEW.ONNX", "sub/bn.onnx", "seed-1.safetensors"])
def test_another_model_file_is_found(
    signed: Path, verify: Callable[[], Outcome], mnist_bn: MnistBn, keys: Path, name: str
) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    shutil.copy(signed / "bn.onnx", signed / name)
    done = verify()
    assert done.status == 1
    assert done.err == f"FAILED: {SIGNATURE} does not hold: {name} is not covered\n"

    before = SIGNATURE.read_bytes()
    done = mnist_bn("sign", "--key", str(keys / "ours.pem"))
    assert done.status == 2
    assert f"{signed / name}: not made by the pipeline" in done.err
    assert SIGNATURE.read_bytes() == before


def test_every_difference_is_named(signed: Path, verify: Callable[[], Outcome]) -> None:
    (signed / "plain.safetensors").unlink()
    (signed / "bn.onnx").write_bytes(b"other")
    (signed / "new.onnx").write_bytes(b"new")
    assert verify().err == (
        f"FAILED: {SIGNATURE} does not hold: plain.safetensors is missing; bn.onnx was changed; "
        "new.onnx is not covered\n"
    )


def test_another_key_does_not_hold(signed: Path, mnist_bn: MnistBn, keys: Path) -> None:
    done = mnist_bn("verify-signature", "--key", str(keys / "other.pub.pem"))
    assert done.status == 1
    assert f"was not made with the private key of {keys / 'other.pub.pem'}" in done.err


def test_the_claim_of_a_key_is_not_believed(
    signed: Path, verify: Callable[[], Outcome], keys: Path
) -> None:
    ours = json.loads(SIGNATURE.read_text())
    sign(signed, keys / "other.pem")
    other = json.loads(SIGNATURE.read_text())
    SIGNATURE.write_text(json.dumps(ours | {"dsseEnvelope": other["dsseEnvelope"]}))
    done = verify()
    assert done.status == 1
    assert "was not made with the private key of" in done.err


def test_digests_that_fit_are_not_believed(signed: Path, verify: Callable[[], Outcome]) -> None:
    bn = signed / "bn.onnx"
    document = json.loads(SIGNATURE.read_text())
    payload = base64.b64decode(document["dsseEnvelope"]["payload"]).decode()
    before = digest(bn)
    bn.write_bytes(b"other")
    payload = payload.replace(before, digest(bn))
    document["dsseEnvelope"]["payload"] = base64.b64encode(payload.encode()).decode()
    SIGNATURE.write_text(json.dumps(document))
    done = verify()
    assert done.status == 1
    assert "or was altered" in done.err


def test_signature_of_another_folder_does_not_hold(
    signed: Path, verify: Callable[[], Outcome], keys: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.bin").write_bytes(b"1")
    signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem").sign(other, SIGNATURE)
    done = verify()
    assert done.status == 1
    assert "weights.bin is missing; " in done.err
    assert "plain.safetensors is not covered" in done.err


def test_signature_of_some_of_the_files_does_not_hold(
    signed: Path, verify: Callable[[], Outcome], keys: Path
) -> None:
    """Not even when it says that the others are to be ignored."""
    ignored = [*IGNORED_FILES, "plain.safetensors"]
    signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem").set_hashing_config(
        hashing.Config().set_ignored_paths(paths=ignored)
    ).sign(signed, SIGNATURE)
    assert reference_verifies(keys)[0] == 0
    done = verify()
    assert done.status == 1
    assert done.err == f"FAILED: {SIGNATURE} does not hold: plain.safetensors is not covered\n"


def test_signature_over_other_hashes_is_called_that(
    signed: Path, verify: Callable[[], Outcome], keys: Path
) -> None:
    signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem").set_hashing_config(
        hashing.Config().use_file_serialization(hashing_algorithm="blake3")
    ).sign(signed, SIGNATURE)
    done = verify()
    assert done.status == 1
    assert "in another form than SHA-256 of whole files" in done.err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"verificationMaterial": null}',
        b'{"verificationMaterial": {"publicKey": {}}}',
        b"[" * 100_000,
        b'{"verificationMaterial": ' * 10_000,
    ],
)
def test_what_is_no_signature_is_called_damaged(
    signed: Path, verify: Callable[[], Outcome], content: bytes
) -> None:
    SIGNATURE.write_bytes(content)
    done = verify()
    assert (done.status, done.out) == (1, "")
    assert done.err == f"FAILED: {SIGNATURE} is damaged: no signature of OpenSSF model signing\n"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mediaType", "text/plain"),
        ("verificationMaterial.publicKey", None),
        ("verificationMaterial.publicKey.hint", None),
        ("dsseEnvelope", None),
        ("dsseEnvelope.payload", ""),
        ("dsseEnvelope.payload", "no base64"),
        ("dsseEnvelope.payloadType", "text/plain"),
        ("dsseEnvelope.signatures", []),
        ("dsseEnvelope.signatures.0.sig", ""),
        ("dsseEnvelope.signatures.0.sig", "AAAA"),
    ],
)
def test_damaged_parts_end_in_a_sentence(
    signed: Path, verify: Callable[[], Outcome], path: str, value: object
) -> None:
    document = json.loads(SIGNATURE.read_text())
    part = document
    *way, last = path.split(".")
    for step in way:
        part = part[int(step)] if isinstance(part, list) else part[step]
    part[last] = value
    SIGNATURE.write_text(json.dumps(document))
    done = verify()
    if last == "hint":  # without it, the signature is in the library's older form
        assert done.status == 0
        assert "older" in done.err
        assert done.out.startswith(f"{SIGNATURE} holds")
    else:
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith(f"FAILED: {SIGNATURE} ")


@given(garbage=st.binary(max_size=200))
@example(garbage=b"")
def test_garbage_is_no_signature(shelf: Path, keys: Path, garbage: bytes) -> None:
    path = shelf / SIGNATURE_NAME
    whole = path.read_bytes()
    path.write_bytes(garbage)
    try:
        assert signature_problem(shelf, keys / "ours.pub.pem") is not None
    finally:
        path.write_bytes(whole)


@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_to_a_signature_is_harmless_or_found(
    shelf: Path, keys: Path, data: st.DataObject
) -> None:
    path = shelf / SIGNATURE_NAME
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 100))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + length :]
    path.write_bytes(damaged)
    try:
        problem = signature_problem(shelf, keys / "ours.pub.pem")
    finally:
        path.write_bytes(whole)
    if problem is None:  # the same statement, written otherwise
        envelopes = [json.loads(content)["dsseEnvelope"] for content in (whole, damaged)]
        payloads = [base64.b64decode(envelope["payload"]) for envelope in envelopes]
        assert payloads[0] == payloads[1]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_signature_does_not_hold(
    signed: Path, verify: Callable[[], Outcome], part: float
) -> None:
    content = SIGNATURE.read_bytes()
    SIGNATURE.write_bytes(content[: int(part * len(content))])
    done = verify()
    assert done.status == 1
    assert "is damaged" in done.err


# --- user errors --------------------------------------------------------------------------------


@pytest.mark.usefixtures("models")
def test_no_signature_says_what_makes_one(verify: Callable[[], Outcome], keys: Path) -> None:
    done = verify()
    assert done.status == 2
    assert done.err == f"error: no {SIGNATURE}; run `mnist-bn sign --key KEY.pem` first\n"
    problem = signature_problem(MODELS, keys / "ours.pub.pem")
    assert problem == f"no {SIGNATURE}: the models are not signed"


def test_folder_in_the_signatures_place_is_named(
    models: Path, verify: Callable[[], Outcome], mnist_bn: MnistBn, keys: Path
) -> None:
    (models / SIGNATURE_NAME).mkdir()
    for done in (verify(), mnist_bn("sign", "--key", str(keys / "ours.pem"))):
        assert (done.status, done.out) == (2, "")
        assert "Is a directory" in done.err
        assert str(SIGNATURE) in done.err


@pytest.mark.parametrize("name", SIGNED_FILES)
def test_missing_model_is_not_signed(
    signed: Path, mnist_bn: MnistBn, keys: Path, name: str
) -> None:
    before = SIGNATURE.read_bytes()
    (signed / name).unlink()
    done = mnist_bn("sign", "--key", str(keys / "ours.pem"))
    assert done.status == 2
    assert done.err == f"error: no {signed / name}; run `dvc repro export` first\n"
    assert SIGNATURE.read_bytes() == before


def test_no_model_at_all_is_a_pipeline_that_did_not_run(
    signed: Path, verify: Callable[[], Outcome]
) -> None:
    for name in SIGNED_FILES:
        (signed / name).unlink()
    done = verify()
    assert done.status == 2
    assert "run `dvc repro export` first" in done.err


@pytest.mark.parametrize(
    "line",
    [["sign"], ["sign", "--key", "a.pem", "--new-key", "b.pem"], ["verify-signature"]],
)
@pytest.mark.usefixtures("signed")
def test_a_key_is_needed(mnist_bn: MnistBn, line: list[str]) -> None:
    done = mnist_bn(*line)
    assert done.status == 2
    assert "--key" in done.err
    assert not Path("b.pem").exists()


@pytest.mark.parametrize("absent", ["model_signing", "OpenSSL"])
@pytest.mark.parametrize(
    "line", [["sign", "--key", "k.pem"], ["sign", "--new-key", "k.pem"], ["verify-signature"]]
)
@pytest.mark.usefixtures("signed")
def test_without_the_extra_it_says_what_to_install(
    mnist_bn: MnistBn,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    absent: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    if line == ["verify-signature"]:
        line = [*line, "--key", str(keys / "ours.pub.pem")]
    done = mnist_bn(*line)
    assert (done.status, done.out) == (2, "")
    assert f"import of {absent} halted" in done.err
    assert "pip install 'mnist-batchnorm[signing]'" in done.err
    assert not Path("k.pem").exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_interrupted_signing_leaves_the_old_signature(
    signed: Path,
    mnist_bn: MnistBn,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
) -> None:
    before = {path.name: path.read_bytes() for path in signed.iterdir()}

    def interrupted(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        done = mnist_bn("sign", "--key", str(keys / "ours.pem"))
    assert done.status == (2 if isinstance(fault, OSError) else 130)
    assert {path.name: path.read_bytes() for path in signed.iterdir()} == before


# --- the reference program ----------------------------------------------------------------------


def reference_verifies(keys: Path, *options: str) -> tuple[int, str]:
    return reference_program(
        *("verify", "key", MODELS, "--signature", SIGNATURE),
        *("--public_key", keys / "ours.pub.pem", *options),
    )


def reference_signs(keys: Path, *options: object) -> None:
    assert reference_program(
        *("sign", "key", MODELS, "--signature", SIGNATURE),
        *("--private_key", keys / "ours.pem", *options),
    ) == (0, "Signing succeeded\n")


def test_reference_program_accepts_ours(signed: Path, keys: Path) -> None:
    assert reference_verifies(keys) == (0, "Verification succeeded\n")
    (signed / "registry.json").write_text("{}")
    assert reference_verifies(keys) == (0, "Verification succeeded\n")
    (signed / "notes.txt").write_text("")
    status, output = reference_verifies(keys)
    assert status == 1
    assert "notes.txt" in output
    assert reference_verifies(keys, "--ignore_unsigned_files")[0] == 0
    truncate(signed / "bn.onnx")
    status, output = reference_verifies(keys, "--ignore_unsigned_files")
    assert status == 1
    assert "bn.onnx" in output


def test_ours_accepts_the_reference_programs(
    models: Path, keys: Path, verify: Callable[[], Outcome]
) -> None:
    reference_signs(keys, "--ignore-paths", models / "README.md")
    assert verify().status == 0
    (models / "README.md").write_text("# Other\n")
    assert verify().status == 0
    truncate(models / "bn.onnx")
    assert "bn.onnx was changed" in verify().err


def test_what_the_reference_program_covers_besides_must_hold(
    models: Path, keys: Path, verify: Callable[[], Outcome]
) -> None:
    reference_signs(keys)
    assert verify().status == 0
    (models / "README.md").write_text("# Other\n")
    assert "README.md was changed" in verify().err


def test_ours_refuses_more_than_the_reference_program(
    models: Path, keys: Path, verify: Callable[[], Outcome]
) -> None:
    reference_signs(keys, "--ignore-paths", models / "new.onnx")
    (models / "new.onnx").write_bytes(b"new")
    assert reference_verifies(keys)[0] == 0
    assert "new.onnx is not covered" in verify().err


# --- imports ------------------------------------------------------------------------------------


def test_library_is_imported_where_it_is_needed(signed: Path, keys: Path) -> None:
    """And without a warning, which here is an error."""
    script = """
import sys
from pathlib import Path
from mnist_batchnorm.commands import sign as _, verify_signature
from mnist_batchnorm.signing.signer import sign, signature_problem
heavy = ("model_signing", "sigstore", "cryptography", "torch", "numpy")
print([name for name in heavy if name in sys.modules])
sign(Path("models"), Path(sys.argv[1]))
print(signature_problem(Path("models"), Path(sys.argv[2])))
print([name for name in ("torch", "numpy", "mlflow", "dvc") if name in sys.modules])
"""
    pair = [str(keys / "ours.pem"), str(keys / "ours.pub.pem")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *pair],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\nNone\n[]\n", "")


def test_unusable_key_is_raised_not_returned(signed: Path, keys: Path) -> None:
    """A rule that asks must not take a mistyped path for a signature that does not hold."""
    with pytest.raises(UserError, match=r"no key none\.pem"):
        signature_problem(signed, Path("none.pem"))
