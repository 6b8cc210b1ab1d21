"""TODO."""

import ipaddress
import os
from pathlib import Path

from mnist_batchnorm.core.errors import UserError

TOKEN = "MNIST_BN_TOKEN"  # noqa: S105 - the variable's name

LONG_ENOUGH = 16  # characters of a token


def read_token(path: Path | None) -> str | None:
    """Return the token that requests must bear: from a file, else from the environment.

    Raises:
        UserError: The file cannot be read, or the token is too short or not plain ASCII.
    """
    if path is None:
        token, where = os.environ.get(TOKEN, ""), TOKEN
        if not token:
            return None
    else:
        try:
            token, where = path.read_text(encoding="utf-8").strip(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    if len(token) < LONG_ENOUGH or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{where} holds no token: expected {LONG_ENOUGH} or more visible ASCII characters; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
