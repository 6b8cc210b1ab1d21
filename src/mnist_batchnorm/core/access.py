"""Access control shared by the server and its clients: the bearer token and loopback addresses."""

import ipaddress
import os
from pathlib import Path

from mnist_batchnorm.core.errors import UserError

TOKEN = "MNIST_BN_TOKEN"  # noqa: S105 - of the environment
MIN_TOKEN_LENGTH = 16  # characters


def read_token(path: Path | None) -> str | None:
    """Return the bearer token, from a file or else from the environment; None if there is none.

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
    visible = token.isascii() and token.isprintable() and " " not in token
    if len(token) < MIN_TOKEN_LENGTH or not visible:
        raise UserError(
            f"{where} holds no token: expected {MIN_TOKEN_LENGTH} or more visible ASCII "
            "characters; `openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
