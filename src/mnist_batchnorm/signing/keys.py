"""Elliptic-curve keys in PEM format."""

import importlib
import os
from pathlib import Path

from mnist_batchnorm.core.errors import UserError

PASSPHRASE_VARIABLE = "MNIST_BN_KEY_PASSWORD"  # noqa: S105
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}  # OpenSSF's format


def require_extra() -> None:
    """Raise UserError unless model signing can be imported; takes half a second."""
    try:
        importlib.import_module("model_signing")
    except ImportError as error:
        raise UserError(
            f"signatures need more packages ({error}): pip install 'mnist-batchnorm[signing]'"
        ) from None


def new_key_pair(private_key: Path, passphrase: bytes | None = None) -> Path:
    """Create a key pair on curve P-256; return the public key's file.

    Args:
        private_key: file of the private key, mode 600. For ``name.pem`` the public key's file is
            ``name.pub.pem``.
        passphrase: encrypts the private key.

    Raises:
        UserError: One of the files exists or cannot be written, the passphrase is too long, or the
            extra ``signing`` is not installed. No file is left then.
    """
    require_extra()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    public_key = private_key.with_name(f"{private_key.name.removesuffix('.pem')}.pub.pem")
    if exists := [path for path in (private_key, public_key) if os.path.lexists(path)]:
        raise UserError(
            f"{', '.join(map(str, exists))} exists: a key is never overwritten; choose another name"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase:
        encryption = BestAvailableEncryption(passphrase)
    try:
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    except ValueError as error:  # longer than 1023 bytes
        raise UserError(f"the passphrase cannot be used: {error}") from None
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _create(private_key, secret, 0o600)
    try:
        _create(public_key, public, 0o644)
    except UserError:
        private_key.unlink()
        raise
    return public_key


def check_private_key(path: Path, passphrase: bytes | None) -> bool:
    """Check that a private key can be used; return whether it is encrypted.

    Raises:
        UserError: The file is missing, unreadable or not an elliptic-curve key in PEM, or the
            passphrase is missing or wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = read_key_file(path)
    encrypted = False
    try:
        key = load_pem_private_key(content, None)
    except TypeError:  # encrypted
        encrypted = True
        if not passphrase:
            raise UserError(
                f"{path} is encrypted; set {PASSPHRASE_VARIABLE} to its passphrase"
            ) from None
        try:
            key = load_pem_private_key(content, passphrase)
        except (ValueError, UnsupportedAlgorithm):
            raise UserError(f"the passphrase does not open {path}") from None
    except (ValueError, UnsupportedAlgorithm):
        if b"PUBLIC KEY" in content:
            raise UserError(f"{path} is a public key; signing takes the private one") from None
        raise UserError(f"{path} is not a private key in PEM format") from None
    _check_kind(path, key)
    return encrypted


def check_public_key(path: Path) -> None:
    """Check that a public key can be used.

    Raises:
        UserError: The file is missing, unreadable or not an elliptic-curve key in PEM.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = read_key_file(path)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        if b"PRIVATE KEY" in content:
            raise UserError(f"{path} is a private key; verifying takes the public one") from None
        raise UserError(f"{path} is not a public key in PEM format") from None
    _check_kind(path, key)


def read_key_file(path: Path) -> bytes:
    """Read a key's file.

    Raises:
        UserError: The file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"no key {path}; `mnist-bn sign --new-key {path}` makes a pair and signs with it"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _check_kind(path: Path, key: object) -> None:
    curve = getattr(key, "curve", None)
    *names, last = CURVES.values()
    curves = f"{', '.join(names)} or {last}"
    if curve is None:
        kind = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
        raise UserError(f"{path} is a key of kind {kind}; this takes elliptic-curve keys, {curves}")
    if curve.name not in CURVES:
        raise UserError(f"{path} is a key on curve {curve.name}; this takes {curves}")


def _create(path: Path, content: bytes, mode: int) -> None:
    # exclusively, and with its final mode: at no time can another user read a private key
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with open(descriptor, "wb") as stream:  # noqa: PTH123 - of the descriptor
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        path.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
