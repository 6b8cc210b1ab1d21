"""TODO."""

import base64
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import replacing
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

SIGNED = (*GRAPHS, *(f"{name}.safetensors" for name in VARIANTS))  # in models/

SIGNATURE = "model.sig"  # beside them

# Besides git's own files, what the reference program is told to ignore: without options it then
# accepts the folder as the pipeline leaves it, and nothing else in it.
BESIDE = ("README.md", "registry.json", SIGNATURE)

MODEL_SUFFIXES = {".onnx", ".safetensors"}

PASSPHRASE = "MNIST_BN_KEY_PASSWORD"  # noqa: S105 - the environment variable's name

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}  # that the format knows


def sign(models: Path, private_key: Path, passphrase: bytes | None = None) -> Path:
    """Sign the model files of a folder.

    Args:
        models: the folder.
        private_key: elliptic-curve key, PEM.
        passphrase: of the key; not looked at when it is not encrypted.

    Returns:
        The signature's file, in the same folder.

    Raises:
        UserError: A model file is missing, there are others, the key cannot be used, or the extra
            ``signing`` is not installed. What signature was there before still is.
    """
    _check_models(models)
    _require_extra()
    from model_signing import signing

    from mnist_batchnorm.signing.signed_files import SignedFiles

    encrypted = load_private_key(private_key, passphrase)[1]
    config = signing.Config().use_elliptic_key_signer(
        private_key=private_key,
        # annotated as str, but handed to cryptography as it is, which takes bytes only
        password=passphrase if encrypted else None,  # type: ignore[arg-type]
    )
    config.set_hashing_config(SignedFiles(_model_files).set_ignored_paths(paths=BESIDE))
    signature = models / SIGNATURE
    with replacing(signature) as temporary:
        config.sign(models, temporary)
    return signature


def signature_problem(models: Path, public_key: Path) -> str | None:
    """Say why the signature in a folder does not hold for its model files; None when it does.

    It holds when the key's owner signed every model file of the pipeline as it is here, and no
    other model file (`MODEL_SUFFIXES`) is in the folder or below it.

    Args:
        models: the folder.
        public_key: elliptic-curve key, PEM.

    Returns:
        One sentence, without a full stop.

    Raises:
        UserError: The key cannot be used, or the extra ``signing`` is not installed.
        OSError: A file cannot be read.
    """
    _require_extra()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    from mnist_batchnorm.signing.signed_files import SignedFiles

    load_public_key(public_key)
    signature = models / SIGNATURE
    if not signature.exists():
        return f"no {signature}: the models are not signed"
    files = SignedFiles(_model_files).set_ignored_paths(paths=[], ignore_git_paths=False)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    # which makes it name the signed files to `files`, and that one says what else to look at
    config.set_hashing_config(files).set_ignore_unsigned_files(True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints a warning of old formats
            config.verify(models, signature)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - of damaged bytes it raises whatever comes
        if files.found is not None:
            return f"{signature} does not hold: {_difference(files.found, signature)}"
        if isinstance(error, InvalidSignature) or "Key mismatch" in str(error):
            return f"{signature} was not made with the private key of {public_key}, or was altered"
        return f"{signature} is damaged: no signature of OpenSSF model signing"
    return None


def new_key_pair(private_key: Path, passphrase: bytes | None = None) -> Path:
    """Make a key pair on curve P-256.

    Args:
        private_key: where the private key goes, as a file of mode 600. The public one goes beside
            it: ``name.pub.pem`` for ``name.pem``.
        passphrase: encrypts the private key.

    Returns:
        The public key's file.

    Raises:
        UserError: One of the files exists or cannot be written, the passphrase is too long, or the
            extra ``signing`` is not installed. Then there is neither file.
    """
    _require_extra()
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
            f"{_listed(exists)} exists: a key is never overwritten; choose another name"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase:
        encryption = BestAvailableEncryption(passphrase)
    try:
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    except ValueError as error:  # more than 1023 bytes
        raise UserError(f"the passphrase cannot be used: {error}") from None
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _create(private_key, secret, 0o600)
    try:
        _create(public_key, public, 0o644)
    except UserError:
        private_key.unlink()
        raise
    return public_key


def load_private_key(
    path: Path, passphrase: bytes | None
) -> tuple["EllipticCurvePrivateKey", bool]:
    """Read a private key, and say whether it is encrypted.

    Raises:
        UserError: It is missing, unreadable, no elliptic-curve key in PEM, or encrypted and the
            passphrase is missing or wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path)
    encrypted = False
    try:
        key = load_pem_private_key(content, None)
    except TypeError:  # how it says that there must be a passphrase
        encrypted = True
        if not passphrase:
            raise UserError(f"{path} is encrypted; set {PASSPHRASE} to its passphrase") from None
        try:
            key = load_pem_private_key(content, passphrase)
        except (ValueError, UnsupportedAlgorithm):
            raise UserError(f"the passphrase does not open {path}") from None
    except (ValueError, UnsupportedAlgorithm):
        if b"PUBLIC KEY" in content:
            raise UserError(f"{path} is a public key; signing takes the private one") from None
        raise UserError(f"{path} is no private key in PEM format") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(_other_kind(path, key))
    _check_curve(path, key.curve.name)
    return key, encrypted


def load_public_key(path: Path) -> "EllipticCurvePublicKey":
    """Read a public key.

    Raises:
        UserError: It is missing, unreadable or no elliptic-curve key in PEM.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read_key(path)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        if b"PRIVATE KEY" in content:
            raise UserError(f"{path} is a private key; verifying takes the public one") from None
        raise UserError(f"{path} is no public key in PEM format") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise UserError(_other_kind(path, key))
    _check_curve(path, key.curve.name)
    return key


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"no key {path}; `mnist-bn sign --new-key {path}` makes a pair and signs with it"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _other_kind(path: Path, key: object) -> str:
    kind = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
    return f"{path} is a key of kind {kind}; this takes elliptic-curve keys, {_curves()}"


def _check_curve(path: Path, curve: str) -> None:
    if curve not in CURVES:
        raise UserError(f"{path} is a key on curve {curve}; this takes {_curves()}")


def _curves() -> str:
    *names, last = CURVES.values()
    return f"{', '.join(names)} or {last}"


def _create(path: Path, content: bytes, mode: int) -> None:
    """Make a file that was not there; nobody else can read it in the meantime."""
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


def _require_extra() -> None:
    """Raise unless model signing can be imported; half a second, so only where it is needed."""
    try:
        importlib.import_module("model_signing")
    except ImportError as error:
        raise UserError(
            f"signatures need more packages ({error}): pip install 'mnist-batchnorm[signing]'"
        ) from None


def _model_files(models: Path) -> set[Path]:
    """Find every model file in a folder and below, the pipeline's or not."""
    return {
        path
        for path in models.rglob("*")
        if path.suffix.lower() in MODEL_SUFFIXES and path.is_file()
    }


def _difference(found: Mapping[str, str], signature: Path) -> str:
    """Say how files differ from what a signature, known to be the key's, says of them.

    Args:
        found: SHA-256 of each file.
        signature: the signature's file.
    """
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    predicate = json.loads(base64.b64decode(envelope["payload"])).get("predicate", {})
    method = predicate.get("serialization", {})
    if (method.get("method"), method.get("hash_type")) != ("files", "sha256"):
        return "it is in another form than SHA-256 of whole files, the only one that this compares"
    signed = {resource["name"]: resource["digest"] for resource in predicate["resources"]}
    kinds = {
        "is missing": signed.keys() - found.keys(),
        "was changed": {
            name for name in signed.keys() & found.keys() if signed[name] != found[name]
        },
        "is not covered": found.keys() - signed.keys(),
    }
    return "; ".join(f"{name} {what}" for what, names in kinds.items() for name in sorted(names))


def _listed(paths: Iterable[object]) -> str:
    return ", ".join(str(path) for path in paths)


def missing_models(models: Path, names: Iterable[str]) -> UserError:
    """Say which files of the pipeline are missing, and what makes them."""
    return UserError(f"no {_listed(models / name for name in names)}; run `dvc repro export` first")


def _check_models(models: Path) -> None:
    if missing := [name for name in SIGNED if not (models / name).is_file()]:
        raise missing_models(models, missing)
    if others := sorted(_model_files(models) - {models / name for name in SIGNED}):
        raise UserError(
            f"{_listed(others)}: not made by the pipeline, so not signed, and beside the signature "
            "it would make that fail; move it out of the folder"
        )
