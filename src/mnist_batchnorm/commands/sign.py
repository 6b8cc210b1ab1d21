"""Command sign: sign the model files, so that anyone can verify offline who released them.

``--new-key`` is for machines without openssl: one command creates the key and signs.
"""

import os
import sys
from pathlib import Path

import click

from mnist_batchnorm.commands.options import FILE
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.keys import PASSPHRASE_VARIABLE, new_key_pair, read_key_file
from mnist_batchnorm.signing.signer import SIGNED_FILES, check_models, sign


def passphrase_of(private_key: Path, *, new: bool) -> bytes | None:
    """Return the passphrase in the environment, or prompt for it; None: the key has none."""
    if passphrase := os.environ.get(PASSPHRASE_VARIABLE):
        return os.fsencode(passphrase)
    if not sys.stdin.isatty() or not (new or b"ENCRYPTED" in read_key_file(private_key)):
        return None
    answer: str = click.prompt(
        "Passphrase for the new key (empty for none)" if new else f"Passphrase of {private_key}",
        default="" if new else None,
        show_default=False,
        hide_input=True,
        confirmation_prompt=new,
        err=True,
    )
    return answer.encode() or None


@click.command()
@click.option("--key", type=FILE, metavar="KEY.pem", help="The private key: elliptic curve, PEM.")
@click.option(
    "--new-key",
    type=FILE,
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
    """  # noqa: D301 - click's \b
    check_models(MODELS)  # before the options: without models no key is of use
    private_key = key or new_key
    if private_key is None or (key and new_key):
        raise click.UsageError("give --key KEY.pem, or --new-key KEY.pem to make one")
    passphrase = passphrase_of(private_key, new=key is None)
    if new_key:
        public_key = new_key_pair(new_key, passphrase)
        kind = "encrypted" if passphrase else "not encrypted"
        click.echo(f"{new_key}: the private key, {kind}; keep it out of git")
        click.echo(f"{public_key}: the public key, for those who verify")
    signature = sign(MODELS, private_key, passphrase)
    click.echo(f"{signature}: signed {', '.join(SIGNED_FILES)}")
