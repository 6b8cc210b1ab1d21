"""A client of the Open Inference Protocol over HTTP, for images of digits."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.access import TOKEN, is_loopback
from mnist_batchnorm.core.errors import UserError

if TYPE_CHECKING:
    import requests

PATIENCE = (5.0, 30.0)  # seconds to connect, and for the next byte
TRIES = 4  # of a request that a server is too busy for
LONGEST_PAUSE = 5.0  # seconds between them, whatever the server says

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Answers:
    """What a model makes of some pictures.

    Attributes:
        version: of the model that answered.
        logits: float32 ``[n, 10]``.
    """

    version: str
    logits: npt.NDArray[np.float32]


Model: TypeAlias = Callable[[Pixels], Answers]  # of uint8 [n, 28, 28]


class Server:
    """A server of the Open Inference Protocol.

    Args:
        url: its address, with the path where the protocol's ``/v2`` is.
        token: to show it; None where it wants none.
        insecure: send the token unencrypted to another machine.

    Raises:
        UserError: The address is none, or the token would go unencrypted to another machine.
    """

    def __init__(self, url: str, token: str | None, *, insecure: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UserError(f"--url: got {url!r}, expected one like http://127.0.0.1:8000")
        if parts.username or parts.query or parts.fragment:
            raise UserError("--url: expected no user, ? or # in it; a token goes in --token-file")
        local = is_loopback(parts.hostname)
        if token is not None and parts.scheme == "http" and not local and not insecure:
            raise UserError(
                f"--url {url} would send the token in clear, for all on the way to read: give an "
                f"https:// address, or no token (--token-file, {TOKEN}), or say --insecure"
            )
        self._url = url.rstrip("/")
        self._token = token
        self._proxied = not local

    def model(self, name: str) -> Model:
        """Return one of its models."""

        def answer(pixels: Pixels) -> Answers:
            return self._ask(name, pixels)

        return answer

    def _ask(self, name: str, pixels: Pixels) -> Answers:
        image = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(pixels.shape),
            "data": pixels.ravel().tolist(),
        }
        said = self._post(
            f"{self._url}/v2/models/{quote(name, safe='')}/infer", {"inputs": [image]}
        )
        try:
            (data,) = [one["data"] for one in said["outputs"] if one["name"] == "logits"]
            logits = np.array(data, np.float32).reshape(len(pixels), CLASSES)
            version = str(said.get("model_version", ""))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._url}: {name} gave no logits [{len(pixels)}, {CLASSES}]; is it this "
                "project's model?"
            ) from None
        return Answers(version, logits)

    def _post(self, url: str, content: object) -> dict[str, Any]:
        import requests

        for remaining in reversed(range(TRIES)):
            try:
                with requests.Session() as session:
                    session.trust_env = self._proxied  # no proxy knows this machine as 127.0.0.1
                    response = session.post(
                        url,
                        json=content,
                        auth=self._authorize,
                        timeout=PATIENCE,
                        allow_redirects=False,  # a token is for the server that was named
                    )
            except requests.RequestException as error:
                raise UserError(f"{self._url} does not answer: {_why(error)}; is it up?") from None
            if response.status_code != requests.codes.unavailable or not remaining:
                break
            time.sleep(_pause(response.headers.get("Retry-After")))
        said = _json(response)
        if response.status_code != requests.codes.ok:
            reason = said.get("error") or response.reason
            advice = f"; give it in --token-file or {TOKEN}" if response.status_code == 401 else ""
            raise UserError(f"{self._url} refuses ({response.status_code}): {reason}{advice}")
        return said

    def _authorize(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        # also where there is none: requests would look into ~/.netrc
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _why(error: Exception) -> str:
    """Say what failed without the layers around it."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(getattr(error, "reason", error))
    return " ".join(text.rpartition("): ")[2].split())  # behind which object it was


def _pause(header: str | None) -> float:
    try:
        return min(max(float(header or 1), 0.1), LONGEST_PAUSE)
    except ValueError:  # a date
        return 1.0


def _json(response: "requests.Response") -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
