"""Tool verify-signature: are the model files those that somebody signed? `sign` does the work."""

from pathlib import Path

import click

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.signing.signer import SIGNATURE, SIGNED, missing_models, signature_problem


@click.command()
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="KEY.pub.pem",
    help="The public key of the one who should have signed.",
)
def command(key: Path | None) -> None:
    """Check models/model.sig: these model files, all of them and no others, were signed.

    It says who let these bytes go, not that they are right; `mnist-bn verify` says that.
    Exit status: 0 it holds, 1 it does not, 2 there is nothing to check, or nothing to check it
    with.
    """
    # one missing file is a signature that does not hold; none at all is a pipeline that did not run
    if not any((MODELS / name).is_file() for name in SIGNED):
        raise missing_models(MODELS, SIGNED)
    if key is None:
        raise click.UsageError("give the public key: --key KEY.pub.pem")
    signature = MODELS / SIGNATURE
    if not signature.exists():
        raise UserError(f"no {signature}; run `mnist-bn sign --key KEY.pem` first")
    if problem := signature_problem(MODELS, key):
        raise CheckFailedError(problem)
    click.echo(f"{signature} holds: {', '.join(SIGNED)} are as the owner of {key} signed them")
