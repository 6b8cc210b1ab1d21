"""A file received over HTTP, within limits on its size, its rate and the number of attempts.

Not by pooch: it limits neither size nor rate, and verifies the file as it was sent, here gzipped.
"""

import io
import re
import threading
import time
from dataclasses import dataclass
from typing import Any

import click
import requests
import tenacity
from tqdm import tqdm

CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """When a source counts as bad."""

    connect_s: float = 5.0
    read_s: float = 20.0  # without a byte
    grace_s: float = 30.0  # before the rate counts: name resolution, headers, slow start
    bytes_per_s: float = 16 * 1024  # on average after the grace period
    file_bytes: int = 1 << 28  # of one file, sent or expanded; MNIST's largest has 47 MB
    attempts: int = 3  # at one URL
    backoff_s: float = 1.0  # before the second attempt, doubled each time, plus jitter


class SourceError(Exception):
    """A source did not provide a file; the message is the reason."""


class AbsentError(SourceError):
    """There is no file of this name."""


class TransientError(SourceError):
    """The transfer failed after a connection was made; a retry may work."""


def receive(url: str, limits: Limits) -> bytes:
    """Return the body of a response, after retries if need be.

    Raises:
        AbsentError: There is no such file.
        SourceError: The transfer failed or exceeded a limit.
    """
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=tenacity.stop_after_attempt(limits.attempts),
        wait=tenacity.wait_exponential(limits.backoff_s)
        + tenacity.wait_random(0, limits.backoff_s),
        before_sleep=_log_retry,
        reraise=True,
    )
    return retry(_receive, url, limits)


def _log_retry(state: tenacity.RetryCallState) -> None:
    assert state.outcome and state.next_action  # noqa: PT018
    name, reason = state.args[0].rpartition("/")[2], state.outcome.exception()
    click.echo(f"{name}: {reason}; again in {state.next_action.sleep:.1f} s", err=True)


def _receive(url: str, limits: Limits) -> bytes:
    body, started = io.BytesIO(), time.monotonic()
    errors: list[Exception] = []
    label = url.rpartition("/")[2]

    def read() -> None:
        try:
            timeouts = (limits.connect_s, limits.read_s)
            headers = {"Accept-Encoding": "identity"}
            with requests.get(url, stream=True, timeout=timeouts, headers=headers) as response:
                response.raise_for_status()
                length = response.headers.get("Content-Length", "")
                bar.total = int(length) if length.isdecimal() else None
                for chunk in response.iter_content(CHUNK_BYTES):
                    if body.tell() + len(chunk) > limits.file_bytes:
                        raise SourceError(f"sends more than {limits.file_bytes:,} bytes")
                    bar.update(body.write(chunk))
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    with body, tqdm(desc=label, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        # A thread reads, so that the limit on the rate also holds where no socket timeout does:
        # while a name is resolved, and while bytes, even of the headers, trickle in. It ends when
        # it writes to the closed body.
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        while thread.is_alive():
            elapsed_s, allowed_s = time.monotonic() - started, limits.grace_s
            allowed_s += body.tell() / limits.bytes_per_s
            if elapsed_s >= allowed_s:
                raise SourceError(f"too slow: {body.tell():,} bytes in {elapsed_s:.0f} s")
            thread.join(allowed_s - elapsed_s)
        if errors:
            raise _reason(errors[0], limits) from None
        return body.getvalue()


def _reason(error: Exception, limits: Limits) -> Exception:
    """Translate an error of requests into a SourceError; return any other unchanged."""
    cause: Any = error.args[0] if error.args else error
    match error:
        case requests.HTTPError():
            status = error.response.status_code
            # 403 is S3's answer for a file that does not exist
            kind = AbsentError if status in {403, 404, 410} else SourceError
            if status in {408, 429} or status >= 500:
                kind = TransientError
            return kind(f"HTTP status {status} {error.response.reason}")
        case requests.ConnectTimeout():
            return SourceError(f"no connection within {limits.connect_s:g} s")
        case requests.ConnectionError() if hasattr(cause, "reason"):
            # Refused, unknown host, certificate, proxy: the next source is nearer than a cure.
            reason = re.sub(r"^HTTPS?Connection\(.*?\): ", "", str(cause.reason))
            return SourceError(f"no connection: {reason}")
        case (
            requests.ConnectionError()
            | requests.Timeout()
            | requests.exceptions.ChunkedEncodingError()
        ):
            return TransientError(f"transfer broke off: {cause}")
        case requests.RequestException() | ValueError():  # ValueError: a malformed host
            return SourceError(str(error))
    return error
