"""``mnist-bn predict``: pictures in, digits out, here and over the protocol."""

import contextlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.client import http as client
from mnist_batchnorm.core.access import TOKEN as TOKEN_VARIABLE
from mnist_batchnorm.parity import runtime
from tests.conftest import MnistBn
from tests.support import candidates, serving
from tests.test_cli import imported

TOKEN = "a-token-that-is-long-enough"
DONE = ["turned grey", "inverted", "cropped", "scaled to 13 x 20", "centred"]


def seven() -> Image.Image:
    """A 7 as a person draws it: blue on white, thick, large."""
    image = Image.new("RGB", (300, 200), "white")
    stroke = [(100, 40), (185, 40), (130, 170)]
    ImageDraw.Draw(image).line(stroke, fill=(20, 30, 90), width=18, joint="curve")
    return image


@pytest.fixture(scope="module")
def proven(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both ONNX files of a trained network, proven, and some pictures."""
    folder = tmp_path_factory.mktemp("proven") / "project"
    serving.lay(folder)
    seven().save(folder / "seven.png")
    seven().save(folder / "seven.jpg")
    for label in range(10):
        split = load_split(prepared / "test.safetensors")
        Image.fromarray(split.images[split.labels == label][0]).save(folder / f"{label}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "seven.png").read_bytes()[:300])
    return folder


@pytest.fixture
def folder(proven: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as working folder."""
    monkeypatch.chdir(proven)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return proven


def results(mnist_bn: MnistBn, *words: str) -> Any:
    done = mnist_bn("predict", *words, "--json")
    assert (done.status, done.err) == (0, "")
    return json.loads(done.out)["files"]


# --- in this process ----------------------------------------------------------------------------


def test_a_drawn_seven_is_classified(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("predict", "seven.png")
    assert (done.status, done.err) == (0, "")
    number = r"(> 99\.9|\d+\.\d|< 0\.1) %"
    assert re.fullmatch(
        rf"seven\.png: 7  {number}, then \d  {number}  \({', '.join(DONE)}\)\n", done.out
    )


def test_the_json_holds_the_networks_probabilities(folder: Path, mnist_bn: MnistBn) -> None:
    files = [f"{label}.png" for label in range(10)]
    found = results(mnist_bn, *files)
    session = runtime.load((folder / "models/bn.onnx").read_bytes())
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    logits = session.run(network_input(pixels)).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert [one["file"] for one in found] == files
    for one, row in zip(found, expected, strict=True):
        (prediction,) = one["predictions"]
        assert one["done"] == []  # MNIST's own images are not touched
        assert prediction["model"] == "mnist-bn"
        assert prediction["probabilities"] == pytest.approx(row.tolist(), rel=1e-9)
        assert [prediction["digit"], prediction["second"]] == np.argsort(-row)[:2].tolist()
    digits = [one["predictions"][0]["digit"] for one in found]
    assert sum(digit == label for label, digit in enumerate(digits)) >= 9


def test_models_are_compared_side_by_side(folder: Path, mnist_bn: MnistBn) -> None:
    words = ("--model", "mnist-bn", "--model", "other=models/bn-folded.onnx")
    (one,) = results(mnist_bn, "seven.png", *words)
    assert [prediction["model"] for prediction in one["predictions"]] == ["mnist-bn", "other"]
    done = mnist_bn("predict", "seven.png", *words)
    lines = done.out.splitlines()
    assert lines[0] == f"seven.png  ({', '.join(DONE)})"
    assert [line.split()[:2] for line in lines[1:]] == [["mnist-bn:", "7"], ["other:", "7"]]


def test_a_picture_is_read_from_standard_input(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO(Path("seven.jpg").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content))
    (one,) = results(mnist_bn, "-")
    assert one["predictions"][0]["digit"] == 7


def test_unreadable_files_are_reported_and_the_others_classified(
    folder: Path, mnist_bn: MnistBn
) -> None:
    files = ("seven.png", "none.png", "notes.txt", "models", "cut.png", "3.png")
    done = mnist_bn("predict", *files)
    assert done.status == 2
    assert [line.split(":")[0] for line in done.out.splitlines()] == ["seven.png", "3.png"]
    *errors, last = done.err.splitlines()
    assert errors[0] == "error: none.png: no such file; check the name"
    assert errors[1].startswith("error: notes.txt: not a picture of a known kind; save it as PNG")
    assert errors[2] == "error: models: cannot be read: Is a directory"
    assert errors[3].startswith("error: cut.png: damaged (")
    assert last == "error: 4 of 6 pictures not read"


def test_the_json_holds_the_errors_of_unreadable_files(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("predict", "none.png", "seven.png", "--json")
    assert done.status == 2
    bad, good = json.loads(done.out)["files"]
    assert bad == {"file": "none.png", "error": "none.png: no such file; check the name"}
    assert good["predictions"][0]["digit"] == 7


def test_an_unproven_file_is_not_used(folder: Path, mnist_bn: MnistBn, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(candidates.shifted(candidates.ALIKE).graph(folded=False))
    done = mnist_bn("predict", "seven.png", "--model", f"mine={other}")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"FAILED: {other} is not asked: ")
    assert "dvc repro verify" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "mnist-plain-2"], "--model mnist-plain-2: which file is it?"),
        (["--model", "=models/bn.onnx"], "--model: got '=models/bn.onnx', expected NAME"),
        (["--model", "a=none.onnx"], "no none.onnx"),
        (["--model", "a=notes.txt"], "notes.txt"),
        (["--insecure"], "--insecure is for a server: give --url too"),
        (["--token-file", "t"], "--token-file is for a server: give --url too"),
        (["--url", "localhost:8000"], "--url: got 'localhost:8000', expected one like http://"),
        (["--url", "http://me:secret@host"], "a token goes in --token-file"),
        (["--url", "http://127.0.0.1:9", "--model", "a=b"], "give the name alone"),
        (["--url", "http://127.0.0.1:9", "--token-file", "none"], "none cannot be read"),
    ],
)
def test_inconsistent_options_are_an_error(
    folder: Path, mnist_bn: MnistBn, words: list[str], message: str
) -> None:
    done = mnist_bn("predict", "seven.png", *words)
    assert done.status in {1, 2}
    assert done.out == ""
    assert message in done.err
    assert "secret" not in done.err


def test_many_pictures_are_classified_in_batches(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f"{label}.png" for label in range(10)]
    whole = results(mnist_bn, *files)
    monkeypatch.setattr("mnist_batchnorm.commands.predict.BATCH_SIZE", 3)
    assert results(mnist_bn, *files) == whole


# --- over the protocol --------------------------------------------------------------------------


Reply = Callable[[dict[str, str], Any], tuple[int, dict[str, str], Any]]


@contextlib.contextmanager
def server(reply: Reply) -> Iterator[str]:
    """A server that answers every POST so: headers and JSON in, status, headers and JSON out."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, said = reply(dict(self.headers) | {"path": self.path}, body)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def logits_of(body: Any) -> Any:
    """An answer in which the digit is the image's number."""
    rows = body["inputs"][0]["shape"][0]
    data = (10.0 * np.eye(10)[np.arange(rows) % 10]).ravel().tolist()
    output = {"name": "logits", "datatype": "FP32", "shape": [rows, 10], "data": data}
    return {"model_name": "any", "model_version": "4", "outputs": [output]}


def test_requests_follow_the_protocol(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is not for this machine
    monkeypatch.delenv("NO_PROXY", raising=False)
    seen = []

    def reply(headers: dict[str, str], body: Any) -> tuple[int, dict[str, str], Any]:
        seen.append((headers, body))
        return 200, {}, logits_of(body)

    with server(reply) as url:
        found = results(mnist_bn, "7.png", "seven.png", "--url", f"{url}/", "--model", "a b")
    ((headers, body),) = seen
    (image,) = body["inputs"]
    assert headers["path"] == "/v2/models/a%20b/infer"
    assert "Authorization" not in headers
    assert (image["datatype"], image["shape"]) == ("UINT8", [2, 28, 28])
    assert image["data"][:784] == np.asarray(Image.open("7.png")).ravel().tolist()
    assert [one["predictions"][0]["digit"] for one in found] == [0, 1]
    assert found[0]["predictions"][0]["version"] == "4"


@pytest.mark.parametrize("by", ["file", "variable"])
def test_the_token_is_sent_and_netrc_is_not_used(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    monkeypatch.setattr("mnist_batchnorm.client.http.is_loopback", lambda _: False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    words = ["--token-file", str(tmp_path / "token")] if by == "file" else []
    if by == "variable":
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    seen = []

    def reply(headers: dict[str, str], body: Any) -> tuple[int, dict[str, str], Any]:
        seen.append(headers["Authorization"])
        return 200, {}, logits_of(body)

    with server(reply) as url:
        results(mnist_bn, "7.png", "--url", url, "--insecure", *words)
    assert seen == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "HTTP://localhost.example.org"])
def test_a_token_is_sent_to_no_other_machine_in_clear(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr("requests.Session.send", lambda *_, **__: pytest.fail("sent"))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    done = mnist_bn("predict", "7.png", "--url", url)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: --url {url} would send the token in clear")
    assert "--insecure" in done.err


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://example.org", TOKEN),
        ("http://example.org", None),
        ("http://localhost:8000", TOKEN),
        ("http://127.0.0.2", TOKEN),
        ("http://[::1]:8000", TOKEN),
    ],
)
def test_a_url_that_exposes_no_token_is_accepted(url: str, token: str | None) -> None:
    client.Client(url, token)


def test_a_busy_server_is_retried_after_the_time_it_names(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    waits = iter(["2", "1000", "soon"])

    def reply(_: dict[str, str], body: Any) -> tuple[int, dict[str, str], Any]:
        wait = next(waits, None)
        if wait is None:
            return 200, {}, logits_of(body)
        return 503, {"Retry-After": wait}, {"error": "busy"}

    with server(reply) as url:
        results(mnist_bn, "7.png", "--url", url)
    assert slept == [2.0, client.MAX_RETRY_DELAY_S, 1.0]


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (401, {"error": "no token"}, "refuses (401): no token; give it in --token-file or MNIST_"),
        (404, {"error": "no model 'mnist-bn'"}, "refuses (404): no model 'mnist-bn'"),
        (503, {"error": "draining"}, "refuses (503): draining"),
        (502, b"<html>", "refuses (502): Bad Gateway"),
        (302, b"", "refuses (302): Found"),
        (200, b"<html>", "gave no logits [1, 10]; is it this project's model?"),
        (200, {"outputs": [{"name": "logits", "data": [1, 2]}]}, "gave no logits [1, 10]"),
        (200, {"outputs": [{"name": "other", "data": [0] * 10}]}, "gave no logits [1, 10]"),
        (200, [], "gave no logits [1, 10]"),
    ],
)
def test_an_error_or_a_malformed_answer_is_reported(
    folder: Path,
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    said: Any,
    message: str,
) -> None:
    monkeypatch.setattr(client, "MAX_RETRY_DELAY_S", 0.0)
    location = {"Location": "http://127.0.0.1:9/elsewhere"}
    with server(lambda *_: (status, location, said)) as url:
        done = mnist_bn("predict", "7.png", "--url", url)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: {url}")
    assert message in done.err


def test_an_unreachable_server_is_reported(folder: Path, mnist_bn: MnistBn) -> None:
    with server(lambda *_: (200, {}, {})) as url:
        pass
    done = mnist_bn("predict", "7.png", "--url", url)
    assert done.status == 2
    assert re.fullmatch(
        rf"error: {url} does not answer: .*Connection refused; is it up\?\n", done.err
    )


def test_our_server_gives_the_same_results_as_this_process(folder: Path, mnist_bn: MnistBn) -> None:
    files = [f"{label}.png" for label in range(10)]
    with serving.running(folder=folder) as server:
        remote = results(mnist_bn, *files, "seven.jpg", "--url", server.url)
    assert remote == results(mnist_bn, *files, "seven.jpg")


# --- what is imported ---------------------------------------------------------------------------


def test_predict_imports_neither_training_nor_tracking(folder: Path) -> None:
    modules = imported("predict", "seven.png")
    assert "onnxruntime" in modules
    assert not modules & {"torch", "mlflow", "onnx", "matplotlib", "uvicorn", "starlette"}
