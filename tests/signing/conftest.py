"""Key pairs, and model files with and without a signature."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa

from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.keys import PASSPHRASE_VARIABLE
from mnist_batchnorm.signing.signer import SIGNED_FILES, sign
from tests.conftest import MnistBn, Outcome

PASSPHRASE = "correct horse battery staple"

PrivateKey = (
    ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey | ed25519.Ed25519PrivateKey
)


def write_pair(path: Path, key: PrivateKey, passphrase: str = "") -> None:
    encryption: pem.KeySerializationEncryption = pem.NoEncryption()
    if passphrase:
        encryption = pem.BestAvailableEncryption(passphrase.encode())
    path.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub.pem").write_bytes(public)


def write_models(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(SIGNED_FILES):
        (folder / name).write_bytes(bytes([number]) * (40 + number))
    (folder / "README.md").write_text("# Models\n")
    (folder / ".gitignore").write_text("/x\n")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of key pairs."""
    folder = tmp_path_factory.mktemp("keys")
    write_pair(folder / "ours.pem", ec.generate_private_key(ec.SECP256R1()))
    write_pair(folder / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    write_pair(folder / "locked.pem", ec.generate_private_key(ec.SECP256R1()), PASSPHRASE)
    write_pair(folder / "p384.pem", ec.generate_private_key(ec.SECP384R1()))
    write_pair(folder / "p521.pem", ec.generate_private_key(ec.SECP521R1()))
    write_pair(folder / "k1.pem", ec.generate_private_key(ec.SECP256K1()))
    write_pair(folder / "rsa.pem", rsa.generate_private_key(65537, 2048))
    write_pair(folder / "ed25519.pem", ed25519.Ed25519PrivateKey.generate())
    return folder


@pytest.fixture
def models(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's models, not signed; no passphrase in the environment."""
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    write_models(project / MODELS)
    return MODELS


@pytest.fixture
def signed(models: Path, keys: Path) -> Path:
    """The project's models, signed by ``ours.pem``."""
    sign(models, keys / "ours.pem")
    return models


@pytest.fixture(scope="session")
def shelf(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed folder for tests of many examples, which put back what they change."""
    folder = tmp_path_factory.mktemp("shelf") / "models"
    write_models(folder)
    sign(folder, keys / "ours.pem")
    return folder


@pytest.fixture
def verify(mnist_bn: MnistBn, keys: Path) -> Callable[[], Outcome]:
    """Run ``mnist-bn verify-signature`` with the public key of ``ours.pem``."""
    return lambda: mnist_bn("verify-signature", "--key", str(keys / "ours.pub.pem"))
