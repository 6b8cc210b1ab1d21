"""Keys: which are usable, how they are created, and where their passphrase comes from."""

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.keys import PASSPHRASE_VARIABLE, check_private_key, check_public_key
from mnist_batchnorm.signing.signer import SIGNATURE as SIGNATURE_NAME
from mnist_batchnorm.signing.signer import signature_problem
from tests.conftest import MnistBn
from tests.signing.conftest import PASSPHRASE

SIGNATURE = MODELS / SIGNATURE_NAME


@pytest.fixture
def mistakes(keys: Path) -> Path:
    """`keys`, with files that are not keys."""
    (keys / "empty.pem").write_bytes(b"")
    (keys / "noise.pem").write_bytes(bytes(range(256)))
    (keys / "part.pem").write_bytes((keys / "ours.pem").read_bytes()[:-60])
    (keys / "folder.pem").mkdir(exist_ok=True)
    return keys


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("none.pem", "no key {}; `mnist-bn sign --new-key {}` makes a pair and signs with it"),
        ("empty.pem", "{} is not a private key in PEM format"),
        ("noise.pem", "{} is not a private key in PEM format"),
        ("part.pem", "{} is not a private key in PEM format"),
        ("folder.pem", "{} cannot be read: Is a directory"),
        ("ours.pub.pem", "{} is a public key; signing takes the private one"),
        (
            "rsa.pem",
            "{} is a key of kind RSA; this takes elliptic-curve keys, P-256, P-384 or P-521",
        ),
        ("ed25519.pem", "{} is a key of kind Ed25519; this takes elliptic-curve keys"),
        ("k1.pem", "{} is a key on curve secp256k1; this takes P-256, P-384 or P-521"),
        ("locked.pem", "{} is encrypted; set MNIST_BN_KEY_PASSWORD to its passphrase"),
    ],
)
def test_unusable_private_key_is_refused(mistakes: Path, name: str, complaint: str) -> None:
    key = mistakes / name
    with pytest.raises(UserError) as refusal:
        check_private_key(key, None)
    assert str(refusal.value).startswith(complaint.replace("{}", str(key)))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("none.pem", "no key {}"),
        ("empty.pem", "{} is not a public key in PEM format"),
        ("noise.pem", "{} is not a public key in PEM format"),
        ("folder.pem", "{} cannot be read: Is a directory"),
        ("ours.pem", "{} is a private key; verifying takes the public one"),
        ("locked.pem", "{} is a private key; verifying takes the public one"),
        ("rsa.pub.pem", "{} is a key of kind RSA; this takes elliptic-curve keys"),
        ("ed25519.pub.pem", "{} is a key of kind Ed25519; this takes elliptic-curve keys"),
        ("k1.pub.pem", "{} is a key on curve secp256k1; this takes P-256, P-384 or P-521"),
    ],
)
def test_unusable_public_key_is_refused(mistakes: Path, name: str, complaint: str) -> None:
    key = mistakes / name
    with pytest.raises(UserError) as refusal:
        check_public_key(key)
    assert str(refusal.value).startswith(complaint.replace("{}", str(key)))


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("sign", "is not a private key in PEM format"),
        ("verify-signature", "is not a public key in PEM format"),
    ],
)
def test_unusable_key_ends_the_command_and_changes_nothing(
    signed: Path, mnist_bn: MnistBn, mistakes: Path, command: str, complaint: str
) -> None:
    before = SIGNATURE.read_bytes()
    key = mistakes / "noise.pem"
    done = mnist_bn(command, "--key", str(key))
    assert (done.status, done.out, done.err) == (2, "", f"error: {key} {complaint}\n")
    assert SIGNATURE.read_bytes() == before
    assert sorted(path.name for path in signed.glob("*.tmp")) == []


@pytest.mark.usefixtures("models")
def test_new_key_and_signature_in_one_command(mnist_bn: MnistBn) -> None:
    done = mnist_bn("sign", "--new-key", "release.pem")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[:2] == [
        "release.pem: the private key, not encrypted; keep it out of git",
        "release.pub.pem: the public key, for those who verify",
    ]
    assert stat.S_IMODE(Path("release.pem").stat().st_mode) == 0o600
    assert b"PRIVATE" not in Path("release.pub.pem").read_bytes()
    assert mnist_bn("verify-signature", "--key", "release.pub.pem").status == 0
    assert mnist_bn("sign", "--key", "release.pem").status == 0


@pytest.mark.parametrize("there", ["release.pem", "release.pub.pem"])
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.usefixtures("models")
def test_no_key_is_overwritten(mnist_bn: MnistBn, there: str, link: bool) -> None:
    if link:
        Path(there).symlink_to("nowhere")
    else:
        Path(there).write_text("precious")
    before = sorted(Path.cwd().iterdir())
    done = mnist_bn("sign", "--new-key", "release.pem")
    assert (done.status, done.out) == (2, "")
    assert done.err == (f"error: {there} exists: a key is never overwritten; choose another name\n")
    assert sorted(Path.cwd().iterdir()) == before
    assert link or Path(there).read_text() == "precious"
    assert not SIGNATURE.exists()


@pytest.mark.usefixtures("models")
def test_new_key_needs_a_folder(mnist_bn: MnistBn) -> None:
    done = mnist_bn("sign", "--new-key", "nowhere/release.pem")
    assert done.status == 2
    assert "nowhere/release.pem cannot be written: No such file or directory" in done.err


@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.usefixtures("models")
def test_full_disk_leaves_no_part_of_a_key(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        done = mnist_bn("sign", "--new-key", "release.pem")
    assert done.status == 2
    assert "cannot be written: No space left on device" in done.err
    assert list(Path.cwd().glob("*.pem")) == []


def test_encrypted_key_takes_the_passphrase_from_the_environment(
    models: Path, mnist_bn: MnistBn, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    done = mnist_bn("sign", "--key", str(keys / "locked.pem"))
    assert done.status == 0
    assert PASSPHRASE not in done.out + done.err
    assert signature_problem(models, keys / "locked.pub.pem") is None
    # and one that is not encrypted does not mind
    assert mnist_bn("sign", "--key", str(keys / "ours.pem")).status == 0


@pytest.mark.parametrize("wrong", ["wrong", "x" * 2000, "\udcff"])
@pytest.mark.usefixtures("models")
def test_wrong_passphrase_is_called_that(
    mnist_bn: MnistBn, keys: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, wrong)
    done = mnist_bn("sign", "--key", str(keys / "locked.pem"))
    assert done.status == 2
    assert done.err == f"error: the passphrase does not open {keys / 'locked.pem'}\n"
    assert not SIGNATURE.exists()


@pytest.mark.usefixtures("models")
def test_new_key_is_encrypted_where_there_is_a_passphrase(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    done = mnist_bn("sign", "--new-key", "release.pem")
    assert done.status == 0
    assert "release.pem: the private key, encrypted; " in done.out
    assert PASSPHRASE not in done.out + done.err
    assert Path("release.pem").read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY")
    assert mnist_bn("verify-signature", "--key", "release.pub.pem").status == 0
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "x" * 2000)
    done = mnist_bn("sign", "--new-key", "long.pem")
    assert done.status == 2
    assert "the passphrase cannot be used" in done.err
    assert not Path("long.pem").exists()


class Terminal:
    """A person at a terminal, who types the same each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
        self.prompts: list[str] = []
        self.answer = answer
        monkeypatch.setattr("click.termui.hidden_prompt_func", self.ask)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)

    def ask(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.answer


@pytest.mark.usefixtures("models")
def test_person_is_asked_for_the_passphrase(
    mnist_bn: MnistBn, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch, PASSPHRASE)
    done = mnist_bn("sign", "--key", str(keys / "locked.pem"))
    assert done.status == 0
    assert len(terminal.prompts) == 1
    assert PASSPHRASE not in done.out + done.err
    assert mnist_bn("sign", "--key", str(keys / "ours.pem")).status == 0
    assert len(terminal.prompts) == 1  # that one needs none
    done = mnist_bn("sign", "--key", "none.pem")
    assert (done.status, len(terminal.prompts)) == (2, 1)


@pytest.mark.parametrize("answer", ["", PASSPHRASE])
@pytest.mark.usefixtures("models")
def test_person_is_asked_how_to_protect_a_new_key(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    terminal = Terminal(monkeypatch, answer)
    assert mnist_bn("sign", "--new-key", "release.pem").status == 0
    assert len(terminal.prompts) == 2  # the second to be sure of the first
    assert (b"ENCRYPTED" in Path("release.pem").read_bytes()) == bool(answer)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_keys_of_openssl_sign(
    models: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    """As --help and docs/signing.md make them."""

    def openssl(line: str) -> None:
        subprocess.run(["openssl", *line.split()], check=True, capture_output=True)

    openssl("ecparam -name prime256v1 -genkey -noout -out key.pem")
    openssl("ec -in key.pem -pubout -out key.pub.pem")
    if encrypted:
        openssl("ec -in key.pem -aes256 -passout pass:hunter2 -out locked.pem")
        monkeypatch.setenv(PASSPHRASE_VARIABLE, "hunter2")
    assert mnist_bn("sign", "--key", "locked.pem" if encrypted else "key.pem").status == 0
    assert signature_problem(models, Path("key.pub.pem")) is None
