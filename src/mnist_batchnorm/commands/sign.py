"""Tool sign: says who let the model files go, in a way that anybody can check offline.

The signature is OpenSSF model signing's with an elliptic-curve key, so its own program checks it
too (docs/signing.md). What is signed is the files that the pipeline ships, and nothing beside them:
notes and registries in the folder may change. The reverse is strict: a model file that the
signature does not cover makes it fail, whatever the signature says should be ignored.

``--new-key`` is here because a fresh machine has no openssl, and its command line is hard to
remember: making the key and signing is one command, verifying the second.
"""

import os
import sys
from pathlib import Path

import click

from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.signer import (
    PASSPHRASE,
    SIGNED,
    _check_models,
    _read_key,
    new_key_pair,
    sign,
)


def _passphrase(private_key: Path) -> bytes | None:
    """Take the passphrase from the environment, or ask for it when there is one and a person."""
    if given := os.environ.get(PASSPHRASE):
        return os.fsencode(given)
    if sys.stdin.isatty() and b"ENCRYPTED" in _read_key(private_key):
        answer: str = click.prompt(f"Passphrase of {private_key}", hide_input=True, err=True)
        return answer.encode()
    return None


def _new_passphrase() -> bytes | None:
    if given := os.environ.get(PASSPHRASE):
        return os.fsencode(given)
    if not sys.stdin.isatty():
        return None
    answer: str = click.prompt(
        "Passphrase for the new key (empty for none)",
        default="",
        show_default=False,
        hide_input=True,
        confirmation_prompt=True,
        err=True,
    )
    return answer.encode() or None


@click.command()
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="KEY.pem",
    help="The private key: elliptic curve, PEM.",
)
@click.option(
    "--new-key",
    type=click.Path(path_type=Path),
    metavar="KEY.pem",
    help="Make this private key and KEY.pub.pem first; overwrites nothing.",
)
def command(key: Path | None, new_key: Path | None) -> None:
    """Sign the model files in models/; the signature is models/model.sig.

    The passphrase of an encrypted key comes from MNIST_BN_KEY_PASSWORD, or is asked for. A key made
    by --new-key is encrypted when there is a passphrase. Where there is openssl, this makes a pair
    too:

    \b
      openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem
      openssl ec -in KEY.pem -pubout -out KEY.pub.pem

    Keep KEY.pem to yourself and out of git; whoever verifies needs KEY.pub.pem.
    Exit status: 0 signed, 2 not signed.
    """  # noqa: D301 - click wants the character
    _check_models(MODELS)  # before the options: without models no key is any use
    if (key is None) == (new_key is None):
        raise click.UsageError("give --key KEY.pem, or --new-key KEY.pem to make one")
    if new_key is not None:
        passphrase = _new_passphrase()
        public_key = new_key_pair(new_key, passphrase)
        kind = "encrypted" if passphrase else "not encrypted"
        click.echo(f"{new_key}: the private key, {kind}; keep it out of git")
        click.echo(f"{public_key}: the public key, for those who verify")
    private_key = key or new_key
    assert private_key is not None
    signature = sign(MODELS, private_key, passphrase if new_key else _passphrase(private_key))
    click.echo(f"{signature}: signed {', '.join(SIGNED)}")
