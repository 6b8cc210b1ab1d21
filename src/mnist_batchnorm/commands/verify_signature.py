"""Command verify-signature: verify the signature of the model files."""

from pathlib import Path

import click

from mnist_batchnorm.commands.options import FILE
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing import signer


@click.command()
@click.option(
    "--key", type=FILE, metavar="KEY.pub.pem", help="The public key of whoever should have signed."
)
def command(key: Path | None) -> None:
    """Check models/model.sig: these model files, all of them and no others, were signed.

    It says who let these bytes go, not that they are right; `mnist-bn verify` says that.
    Exit status: 0 it holds, 1 it does not, 2 there is nothing to check, or nothing to check it
    with.
    """
    # one missing file makes the signature invalid; without any the pipeline has not run
    if not any((MODELS / name).is_file() for name in signer.SIGNED_FILES):
        raise signer.missing_models(MODELS, signer.SIGNED_FILES)
    if key is None:
        raise click.UsageError("give the public key: --key KEY.pub.pem")
    signature = MODELS / signer.SIGNATURE
    if not signature.exists():
        raise UserError(f"no {signature}; run `mnist-bn sign --key KEY.pem` first")
    if problem := signer.signature_problem(MODELS, key):
        raise CheckFailedError(problem)
    files = ", ".join(signer.SIGNED_FILES)
    click.echo(f"{signature} holds: {files} are as the owner of {key} signed them")
