"""Sign the model files, and verify their signature (docs/signing.md).

The signature is that of OpenSSF model signing with an elliptic-curve key, so its own program
verifies it too. It covers the files that the pipeline ships and no other: notes in the folder may
change. But a model file that the signature does not cover makes it invalid, whatever the signature
says should be ignored.
"""

import base64
import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import replacing
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS
from mnist_batchnorm.signing.keys import check_private_key, check_public_key, require_extra

SIGNED_FILES = (*GRAPHS, *(f"{name}.safetensors" for name in VARIANTS))  # in models/
SIGNATURE = "model.sig"  # in models/

# Besides git's own files, what the signature tells the reference program to ignore: without options
# it then accepts the folder as the pipeline leaves it, and no other file in it.
IGNORED_FILES = ("README.md", "registry.json", SIGNATURE)

MODEL_SUFFIXES = {".onnx", ".safetensors"}


def sign(models: Path, private_key: Path, passphrase: bytes | None = None) -> Path:
    """Sign the model files of a folder; return the signature's file, in the same folder.

    Args:
        models: the folder.
        private_key: elliptic-curve key, PEM.
        passphrase: ignored if the key is not encrypted.

    Raises:
        UserError: A model file is missing, there are others, the key cannot be used, or the extra
            ``signing`` is not installed. A previous signature is kept then.
    """
    check_models(models)
    require_extra()
    from model_signing import signing

    from mnist_batchnorm.signing.selected_files import SelectedFiles

    encrypted = check_private_key(private_key, passphrase)
    config = signing.Config().use_elliptic_key_signer(
        private_key=private_key,
        # annotated as str, but handed to cryptography as it is, which takes bytes only
        password=passphrase if encrypted else None,  # type: ignore[arg-type]
    )
    config.set_hashing_config(
        SelectedFiles(find_model_files).set_ignored_paths(paths=IGNORED_FILES)
    )
    signature = models / SIGNATURE
    with replacing(signature) as temporary:
        config.sign(models, temporary)
    return signature


def signature_problem(models: Path, public_key: Path) -> str | None:
    """Return why a folder's signature is invalid, a sentence without a full stop; None if valid.

    Valid: the key's owner signed every model file of the pipeline as it is here, and the folder and
    its subfolders contain no other model file (`MODEL_SUFFIXES`).

    Args:
        models: the folder.
        public_key: elliptic-curve key, PEM.

    Raises:
        UserError: The key cannot be used, or the extra ``signing`` is not installed.
        OSError: A file cannot be read.
    """
    require_extra()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    from mnist_batchnorm.signing.selected_files import SelectedFiles

    check_public_key(public_key)
    signature = models / SIGNATURE
    if not signature.exists():
        return f"no {signature}: the models are not signed"
    files = SelectedFiles(find_model_files).set_ignored_paths(paths=[], ignore_git_paths=False)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    # it then passes the signed files to `files`, which adds the other model files
    config.set_hashing_config(files).set_ignore_unsigned_files(True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints a warning about old formats
            config.verify(models, signature)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes raise anything
        if files.hashes is not None:
            return f"{signature} does not hold: {_difference(files.hashes, signature)}"
        if isinstance(error, InvalidSignature) or "Key mismatch" in str(error):
            return f"{signature} was not made with the private key of {public_key}, or was altered"
        return f"{signature} is damaged: no signature of OpenSSF model signing"
    return None


def find_model_files(models: Path) -> set[Path]:
    """Find all model files in a folder and its subfolders, including foreign ones."""
    return {
        path
        for path in models.rglob("*")
        if path.suffix.lower() in MODEL_SUFFIXES and path.is_file()
    }


def _difference(found: Mapping[str, str], signature: Path) -> str:
    """Describe how the files' SHA-256 differ from those in an authentic signature."""
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


def missing_models(models: Path, names: Iterable[str]) -> UserError:
    """Return the error for missing model files."""
    paths = ", ".join(str(models / name) for name in names)
    return UserError(f"no {paths}; run `dvc repro export` first")


def check_models(models: Path) -> None:
    """Raise UserError unless a folder contains exactly the pipeline's model files."""
    if missing := [name for name in SIGNED_FILES if not (models / name).is_file()]:
        raise missing_models(models, missing)
    if others := sorted(find_model_files(models) - {models / name for name in SIGNED_FILES}):
        raise UserError(
            f"{', '.join(map(str, others))}: not made by the pipeline, so not signed, and beside "
            "the signature it would make that fail; move it out of the folder"
        )
