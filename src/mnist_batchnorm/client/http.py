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

TIMEOUTS_S = (5.0, 30.0)  # to connect, and for the next byte
ATTEMPTS = 4  # of a request that gets 503
MAX_RETRY_DELAY_S = 5.0  # whatever Retry-After says

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ModelOutput:
    """Logits, float32 ``[n, 10]``, and the version of the model that computed them."""

    version: str
    logits: npt.NDArray[np.float32]


Model: TypeAlias = Callable[[Pixels], ModelOutput]  # takes uint8 [n, 28, 28]


class Client:
    """Sends requests to a server of the Open Inference Protocol.

    Args:
        url: base URL, without the protocol's ``/v2``.
        token: bearer token, if the server requires one.
        insecure: send the token unencrypted to another machine.

    Raises:
        UserError: The URL is invalid, or the token would go unencrypted to another machine.
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

    def infer(self, name: str, pixels: Pixels) -> ModelOutput:
        """Send images to a model of the server.

        Raises:
            UserError: The server cannot be reached or returns an error.
        """
        image = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(pixels.shape),
            "data": pixels.ravel().tolist(),
        }
        url = f"{self._url}/v2/models/{quote(name, safe='')}/infer"
        content = self._post(url, {"inputs": [image]})
        try:
            (data,) = [out["data"] for out in content["outputs"] if out["name"] == "logits"]
            logits = np.array(data, np.float32).reshape(len(pixels), CLASSES)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._url}: {name} gave no logits [{len(pixels)}, {CLASSES}]; is it this "
                "project's model?"
            ) from None
        return ModelOutput(str(content.get("model_version", "")), logits)

    def _post(self, url: str, body: object) -> dict[str, Any]:
        import requests

        for remaining in reversed(range(ATTEMPTS)):
            try:
                with requests.Session() as session:
                    session.trust_env = self._proxied  # no proxy knows this machine as 127.0.0.1
                    response = session.post(
                        url,
                        json=body,
                        auth=self._authorize,
                        timeout=TIMEOUTS_S,
                        allow_redirects=False,  # a token is for the server that was named
                    )
            except requests.RequestException as error:
                raise UserError(
                    f"{self._url} does not answer: {_root_cause(error)}; is it up?"
                ) from None
            if response.status_code != requests.codes.unavailable or not remaining:
                break
            time.sleep(_retry_delay_s(response.headers.get("Retry-After")))
        content = _json(response)
        if response.status_code != requests.codes.ok:
            reason = content.get("error") or response.reason
            advice = f"; give it in --token-file or {TOKEN}" if response.status_code == 401 else ""
            raise UserError(f"{self._url} refuses ({response.status_code}): {reason}{advice}")
        return content

    def _authorize(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        # also without a token: requests would otherwise read ~/.netrc
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _root_cause(error: Exception) -> str:
    # the innermost of the errors that requests and urllib3 wrap
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(getattr(error, "reason", error))
    return " ".join(text.rpartition("): ")[2].split())  # without the object's repr


def _retry_delay_s(header: str | None) -> float:
    try:
        return min(max(float(header or 1), 0.1), MAX_RETRY_DELAY_S)
    except ValueError:  # a date
        return 1.0


def _json(response: "requests.Response") -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
