"""The command: what it starts with, whom it answers, and what it refuses to serve."""

import contextlib
import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
import requests

from mnist_batchnorm import serve
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.http.app import TRACEPARENT
from tests.conftest import ROOT
from tests.serve.process.test_ops import counted, until
from tests.support import commands
from tests.support.serving import Server, lay, running

TOKEN = "0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
STROKE = {
    "name": "image",
    "datatype": "UINT8",
    "shape": [1, 28, 28],
    "data": [[[0] * 28] * 4 + [[0] * 13 + [255] * 2 + [0] * 13] * 20 + [[0] * 28] * 4],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lay(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def start(folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Exit status and last line of a server that should not come up."""
    words = ("mnist-bn", "serve", "--port", "0", *arguments)
    status, err = commands.run(folder, *words, env=commands.environment(**env))
    return status, err.strip().splitlines()[-1]


def get(server: Server, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{server.url}{path}", headers=headers, timeout=10)


# --- which files ------------------------------------------------------------------------------


def test_an_altered_file_is_not_served(folder: Path) -> None:
    altered = bytearray((folder / "models/bn.onnx").read_bytes())
    altered[-1] ^= 1
    (folder / "models/bn.onnx").write_bytes(altered)

    status, says = start(folder)

    assert status == 1
    assert "models/bn.onnx is not served" in says
    assert "run `dvc repro verify`" in says


@pytest.mark.parametrize("report", [None, "{", '{"schema": 1}'], ids=["none", "half", "empty"])
def test_nothing_is_served_without_the_gates_report(folder: Path, report: str | None) -> None:
    path = folder / "reports/parity.json"
    path.unlink() if report is None else path.write_text(report)

    status, says = start(folder)

    assert status == 1
    assert "reports/parity.json" in says


def test_what_failed_a_check_is_not_served(folder: Path) -> None:
    report = json.loads((folder / "reports/parity.json").read_text())
    report["graphs"]["bn-folded.onnx"]["checks"][2]["status"] = "failed"
    (folder / "reports/parity.json").write_text(json.dumps(report))

    status, says = start(folder)

    assert status == 1
    assert "models/bn-folded.onnx is not served" in says
    assert "no parity" in says


def test_unverified_is_told_everywhere(folder: Path) -> None:
    (folder / "reports/parity.json").unlink()

    with running("--allow-unverified", folder=folder) as server:
        metadata = get(server, "/v2/models/mnist-bn").json()
        metrics = get(server, "/metrics").text
        warnings = [line for line in server.log() if line["level"] == "warning"]

    assert metadata["parameters"]["verified"] is False
    assert "no reports/parity.json" in metadata["parameters"]["unverified_because"]
    assert re.search(r'model_info{.*model="mnist-bn".*verified="false".*} 1.0', metrics)
    assert {line["event"] for line in warnings} == {"unverified"}


@pytest.mark.parametrize(
    ("file", "says"),
    [("none.onnx", "no none.onnx; run `dvc repro export` first"), ("reports", "cannot be read")],
)
def test_a_missing_file_is_told(folder: Path, file: str, says: str) -> None:
    status, told = start(folder, file)

    assert status == 2
    assert says in told


def test_what_is_no_model_is_told(folder: Path) -> None:
    (folder / "x.onnx").write_bytes(b"no model")

    status, says = start(folder, "x.onnx", "--allow-unverified")

    assert status == 2
    assert "x.onnx is no ONNX model that runs" in says


def test_versions_side_by_side(folder: Path) -> None:
    (folder / "models/bn.onnx").rename(folder / "old.onnx")

    with running("digits=models/bn-folded.onnx", "digits=old.onnx", folder=folder) as server:
        first, second = get(server, "/v2/models/digits").json()["versions"]
        answers = [
            requests.post(
                f"{server.url}/v2/models/digits{path}/infer", json={"inputs": [STROKE]}, timeout=10
            ).json()["model_version"]
            for path in ("", f"/versions/{first}", f"/versions/{second}")
        ]

    assert answers == [first, first, second]


@pytest.mark.parametrize(
    "word",
    [
        "=models/bn.onnx",
        "a/b=models/bn.onnx",
        "a/b=models:/m/1",
        "\udcff=models/bn.onnx",
        "\udcff=models:/m/1",
        "models/\udcff.onnx",
    ],
)
def test_a_name_that_no_address_can_hold_is_told(folder: Path, word: str) -> None:
    status, says = start(folder, word)

    assert status == 2
    assert f"{word}: got".encode(errors="backslashreplace").decode() in says


ASKED = b"POST /v2/models/mnist-bn/infer HTTP/1.1\r\nHost: localhost\r\n"
MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("head", "end"),
    [
        (b"Content-Length: %d\r\n\r\n" % (4 * MEGABYTE), b""),
        (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (4 * MEGABYTE), b"\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunks"],
)
def test_bodies_together_have_a_limit(folder: Path, head: bytes, end: bytes) -> None:
    limit = 4 * MEGABYTE
    with (
        running("--max-body", f"{limit}", "--max-bodies", f"{limit}", folder=folder) as server,
        contextlib.ExitStack() as stack,
    ):
        both = [stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(2)]
        for connection in both:
            connection.sendall(ASKED + head + bytes(3 * MEGABYTE))
        (one,), _, _ = select.select(both, [], [], 10)
        refused = one.recv(1 << 16)
        (other,) = (connection for connection in both if connection is not one)
        other.sendall(bytes(MEGABYTE) + end)
        answered = other.recv(1 << 16)
        asked = requests.post(
            f"{server.url}/v2/models/mnist-bn/infer", json={"inputs": [STROKE]}, timeout=10
        )

    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in refused
    assert answered.startswith(b"HTTP/1.1 400")  # it is no JSON, and was read to its end
    assert asked.status_code == 200


def test_who_hangs_up_leaves_the_room_to_others(folder: Path) -> None:
    limit = 4 * MEGABYTE
    head = ASKED + b"Content-Length: %d\r\n\r\n" % limit
    with running("--max-body", f"{limit}", "--max-bodies", f"{limit}", folder=folder) as server:

        def are_gone(number: int) -> bool:
            labels = {"model": "mnist-bn", "reason": "gone"}
            return counted(server, "mnist_bn_rejects_total", **labels) == number

        for number in range(1, 6):
            with socket.create_connection(server.address, 10) as connection:
                connection.sendall(head + bytes(3 * MEGABYTE))
            until(partial(are_gone, number))
        with socket.create_connection(server.address, 10) as connection:
            connection.sendall(head + bytes(limit))
            answered = connection.recv(1 << 16)

    assert answered.startswith(b"HTTP/1.1 400")  # no JSON


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_what_was_refused_is_forgotten(folder: Path, last: bytes) -> None:
    size = 16 * MEGABYTE
    sent = ASKED + last + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
    with running(folder=folder) as server, contextlib.ExitStack() as stack:
        before = server.memory()
        for _ in range(12):
            connection = stack.enter_context(socket.create_connection(server.address, 10))
            connection.sendall(sent)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
        kept = server.memory() - before

    assert kept < 48 * MEGABYTE


def test_who_finds_no_room_is_told_as_everybody(folder: Path) -> None:
    """Counted once, by model, with the request's id, and not a line in the log for each."""
    limit = 2 * MEGABYTE
    head = ASKED + b"X-Request-Id: of-mine\r\nContent-Length: %d\r\n\r\n" % limit
    with (
        running("--max-body", f"{limit}", "--max-bodies", f"{limit}", folder=folder) as server,
        contextlib.ExitStack() as stack,
    ):
        full = stack.enter_context(socket.create_connection(server.address, 10))
        full.sendall(head + bytes(limit - 1))
        until(lambda: counted(server, "mnist_bn_queue") == 1)
        for _ in range(6):
            with socket.create_connection(server.address, 10) as connection:
                connection.sendall(head + bytes(limit))
                refused = connection.recv(1 << 16)
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"x-request-id: of-mine" in refused
        full.sendall(b"x")
        assert full.recv(1 << 16).startswith(b"HTTP/1.1 400")
        figures = get(server, "/metrics").text

    assert 'mnist_bn_rejects_total{model="mnist-bn",reason="busy"} 6.0' in figures
    assert 'reason="gone"' not in figures
    assert len(server.events("busy")) < 6


def test_what_is_refused_keeps_no_memory(folder: Path) -> None:
    limit = 16 * MEGABYTE
    limits = ("--max-body", f"{limit}", "--max-bodies", f"{28 * MEGABYTE}")
    head = ASKED + b"Content-Length: %d\r\n\r\n" % limit
    with (
        running(*limits, folder=folder) as server,
        contextlib.ExitStack() as stack,
    ):
        before = server.memory()
        for _ in range(12):
            connection = socket.create_connection(server.address, 10)
            stack.enter_context(connection).sendall(head + bytes(15 * MEGABYTE))
        get(server, "/v2")
        kept = server.memory() - before

    assert kept < 80 * MEGABYTE  # one body, and what there was room for beside it


# --- who ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_other_machines_need_a_token(folder: Path, host: str) -> None:
    status, says = start(folder, "--host", host)

    assert status == 2
    assert "--token-file" in says
    assert "--insecure" in says


def test_insecure_is_a_choice(folder: Path) -> None:
    with running("--host", "0.0.0.0", "--insecure", folder=folder) as server:
        assert get(server, "/v2").ok


def test_a_token_lets_in_and_is_never_logged(folder: Path) -> None:
    (folder / "token").write_text(f"{TOKEN}\n")

    with running("--host", "0.0.0.0", "--token-file", "token", folder=folder) as server:
        assert get(server, "/v2", **BEARER).ok
        assert get(server, "/v2", Authorization=f"bearer  {TOKEN}").ok
        for wrong in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}0"}):
            answer = get(server, "/v2/models/mnist-bn", **wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "Authorization" in answer.json()["error"]
        answer = requests.post(f"{server.url}/v2/models/mnist-bn/infer", timeout=10)
        assert answer.status_code == 401
        assert get(server, "/metrics").status_code == 401
        # probes have no token, and the page asks for it
        for path in ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
            assert get(server, path).ok
        assert TOKEN not in json.dumps(server.log())
        assert len(server.events("rejected")) == 5


@pytest.mark.parametrize(
    ("token", "says"),
    [("short", "16 or more"), ("0123456789abcdef 0123", "visible"), ("é" * 16, "ASCII")],
)
def test_a_poor_token_is_refused(folder: Path, token: str, says: str) -> None:
    status, told = start(folder, MNIST_BN_TOKEN=token)

    assert status == 2
    assert says in told
    assert token not in told


def test_a_token_file_must_be_there(folder: Path) -> None:
    status, says = start(folder, "--token-file", "none")

    assert (status, "none cannot be read" in says) == (2, True)


def test_loading_needs_a_token_even_at_home(folder: Path) -> None:
    with running(folder=folder) as server:
        answer = requests.post(f"{server.url}/v2/repository/models/mnist-bn/unload", timeout=10)

    assert answer.status_code == 403
    assert "--token-file" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_this_machine(host: str) -> None:
    assert serve.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""])
def test_everything_else_is_not(host: str) -> None:
    assert not serve.is_loopback(host)


def test_other_sites_may_ask_only_where_named(folder: Path) -> None:
    page = {"Origin": "https://a.example"}
    with running("--cors", "https://a.example", folder=folder) as server:
        named = get(server, "/v2", **page)
        other = get(server, "/v2", Origin="https://b.example")
    with running(folder=folder) as server:
        nobody = get(server, "/v2", **page)

    allowed = "access-control-allow-origin"
    assert named.headers[allowed] == "https://a.example"
    assert allowed not in other.headers
    assert allowed not in nobody.headers


def test_no_page_of_another_site_asks_a_server_without_a_token(folder: Path) -> None:
    rebound, foreign = {"Host": "evil.example"}, {"Origin": "https://evil.example"}
    with running("--cors", "https://a.example", folder=folder) as server:
        refused = get(server, "/v2", **rebound)
        probed = get(server, "/v2/health/ready", **rebound)
        page = get(server, "/", **rebound)
        posted = [
            requests.post(f"{server.url}/v2/repository/index", headers=headers, timeout=10)
            for headers in (foreign, {"Origin": "https://a.example"}, {"Origin": server.url}, {})
        ]
        metrics = get(server, "/metrics").text
    with running(folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        behind_a_proxy = requests.post(
            f"{server.url}/v2/repository/index", headers=BEARER | rebound | foreign, timeout=10
        )
    with running("--host", "0.0.0.0", "--insecure", folder=folder) as server:
        named = get(server, "/v2", **rebound)

    assert refused.status_code == page.status_code == 403
    assert refused.json()["error"].startswith("Host: got evil.example, expected localhost")
    assert [answer.status_code for answer in posted] == [403, 200, 200, 200]
    assert posted[0].json()["error"].startswith("Origin: got https://evil.example, expected")
    assert 'mnist_bn_rejects_total{model="",reason="host"} 2.0' in metrics
    assert 'mnist_bn_rejects_total{model="",reason="origin"} 1.0' in metrics
    assert probed.ok
    assert behind_a_proxy.ok
    assert named.ok


# --- how ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example/x", ""])
def test_a_site_that_no_browser_would_name_is_told(folder: Path, origin: str) -> None:
    status, says = start(folder, "--cors", origin)

    assert status == 2
    assert f"--cors: got {origin!r}" in says


def test_a_taken_port_is_told(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, says = start(folder, "--port", str(taken.getsockname()[1]))

    assert status == 2
    assert "cannot listen on 127.0.0.1" in says


def test_requests_can_be_found_again(folder: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running("--access-log", folder=folder) as server:
        url = f"{server.url}/v2/models/mnist-bn/infer"
        headers = {"X-Request-Id": "mine", "traceparent": trace}
        told = requests.post(url, json={"inputs": [STROKE]}, headers=headers, timeout=10)
        own = requests.post(url, json={"inputs": [STROKE]}, timeout=10)
        bad = requests.post(url, json={}, headers={**headers, "traceparent": "no"}, timeout=10)
        server.stop()
        lines = server.log()

    assert (told.headers["x-request-id"], told.headers["traceparent"]) == ("mine", trace)
    assert own.headers["x-request-id"] not in ("", "mine")
    assert "traceparent" not in own.headers
    first, second = (line for line in lines if line["event"] == "infer")
    assert (first["request_id"], first["traceparent"], first["rows"]) == ("mine", trace, 1)
    assert second["request_id"] == own.headers["x-request-id"]
    (rejected,) = (line for line in lines if line["event"] == "rejected")
    assert rejected["why"] == bad.json()["error"]
    assert "traceparent" not in rejected


def test_requests_that_need_no_model_can_be_found_again_too(folder: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running("--access-log", folder=folder) as server:
        headers = {"X-Request-Id": "mine", "traceparent": trace}
        told = requests.get(f"{server.url}/v2", headers=headers, timeout=10)
        own = requests.get(f"{server.url}/v2/health/live", timeout=10)
        server.stop()  # the line of a request is written after its answer
        lines = server.events("answered")

    assert (told.headers["x-request-id"], told.headers["traceparent"]) == ("mine", trace)
    assert [line["request_id"] for line in lines] == ["mine", own.headers["x-request-id"]]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/v2", 200),
        ("GET", "/v2/health/live", 200),
    ]


@pytest.mark.parametrize(
    ("parent", "valid"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", True),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
    ],
)
def test_a_trace_is_passed_on_only_if_it_is_one(parent: str, valid: bool) -> None:
    assert bool(TRACEPARENT.fullmatch(parent.encode())) is valid


def test_metrics_and_statistics_count(folder: Path) -> None:
    began = time.time()
    with running(folder=folder) as server:
        url = f"{server.url}/v2/models/mnist-bn/infer"
        for _ in range(3):
            requests.post(url, json={"inputs": [STROKE]}, timeout=10)
        requests.post(url, json={}, timeout=10)
        answered = time.time()
        metrics = get(server, "/metrics").text
        stats = get(server, "/v2/models/mnist-bn/stats").json()["model_stats"]
        everything = get(server, "/v2/models/stats").json()["model_stats"]

    version = stats[0]["version"]
    of = f'model="mnist-bn",version="{version}"'
    assert f"mnist_bn_requests_total{{{of}}} 3.0" in metrics
    assert f"mnist_bn_rows_total{{{of}}} 3.0" in metrics
    assert 'mnist_bn_rejects_total{model="mnist-bn",reason="malformed"} 1.0' in metrics
    assert (
        f'mnist_bn_stage_seconds_count{{model="mnist-bn",stage="infer",version="{version}"}} 3.0'
        in metrics
    )
    (stat,) = stats
    assert (stat["inference_count"], stat["execution_count"]) == (3, 3)
    assert stat["inference_stats"]["compute_infer"]["ns"] > 0
    assert stat["inference_stats"]["success"]["count"] == 3
    assert stat["inference_stats"]["fail"]["count"] == 1
    assert stat["inference_stats"]["fail"]["ns"] > 0
    assert began * 1000 - 100 <= stat["last_inference"] <= answered * 1000 + 100
    (unused,) = (other for other in everything if other["name"] == "mnist-bn-folded")
    assert unused["last_inference"] == unused["inference_stats"]["fail"]["count"] == 0
    assert stat in everything


def test_figures_of_other_servers_are_no_concern(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "theirs"
    shared.mkdir()
    with running(folder=folder, env={"PROMETHEUS_MULTIPROC_DIR": str(shared)}) as server:
        text = get(server, "/metrics").text

    assert "process_resident_memory_bytes" in text
    assert not list(shared.iterdir())


def test_the_server_imports_neither_torch_nor_mlflow() -> None:
    modules = "run", "workers", "routes", "catalog"
    imports = "\n".join(f"import mnist_batchnorm.serve.{name}" for name in modules)
    script = f"{imports}\nimport sys\nprint({{'torch', 'mlflow', 'dvc'}} & set(sys.modules))"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"


def test_every_option_says_what_it_is_for() -> None:
    silent = [p.name for p in serve.command.params if isinstance(p, click.Option) and not p.help]

    assert silent == []


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)

    with pytest.raises(UserError, match=r"mnist-batchnorm\[serve\]"):
        serve.require_extra()


# --- the documentation -------------------------------------------------------------------------

EXAMPLES = re.compile(r"```sh\n(?P<script>.*?)```\n+(?:```json\n(?P<answer>.*?)```)?", re.DOTALL)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("documented") / "pipeline"
    lay(folder)
    with running(folder=folder) as server:
        yield server


def test_the_documented_requests_are_answered_so(documented: Server, tmp_path: Path) -> None:
    examples = list(EXAMPLES.finditer((ROOT / "docs/serving.md").read_text()))
    for example in examples:
        done = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input=example["script"].replace("http://127.0.0.1:8000", documented.url),
            cwd=tmp_path,
            env=commands.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert skeleton(done.stdout) == skeleton(example["answer"] or ""), example["script"]
    assert len(examples) >= 6


FLOAT32 = r"-?(?=(?:0\.0*)?(?:\d\.?){1,9}(?![\d.]))\d+\.\d+(?:e-?\d+)?"  # at most 9 digits count
FORMS = re.compile(rf'(?<=[\[,]){FLOAT32}(?=[],])|(?<="){FLOAT32}:\d(?=")')


def skeleton(answer: str) -> str:
    """An answer without what the network decides: versions, hashes, and numbers but their form."""
    answer = re.sub(r'"(\w*version|\w*sha256)":"[^"]*"', r'"\1":""', answer)
    answer = re.sub(r'"versions":\[[^]]*\]', '"versions":[]', answer)
    return FORMS.sub(lambda found: "1.5:1" if ":" in found[0] else "1.5", answer).replace("\n", "")


@pytest.mark.parametrize(
    ("data", "same"),
    [
        ("[-20.650566,0.012345678,1e-7]", False),
        ("[-20.650566,0.00123456789,3.0e-7]", True),
        ("[-20.650566192626953,8.25,0.5]", False),
        ("[8,8.25,0.5]", False),
        ("[8.25,0.5]", False),
        ('["8.25:1",0.5,0.5]', False),
    ],
)
def test_skeleton_keeps_the_form_of_numbers(data: str, same: bool) -> None:
    assert (skeleton(f'"data":{data}') == skeleton('"data":[1.25,-2.5,10.75]')) == same


@pytest.mark.parametrize(
    ("classes", "same"),
    [
        ('["8.271688:1","-2.212244:3"]', True),
        ('["8.271688192626953:1","-2.212244:3"]', False),
        ('["8.271688:1:3","-2.212244:3"]', False),
        ('["8.271688","-2.212244:3"]', False),
        ('["8.271688:1"]', False),
    ],
)
def test_skeleton_keeps_the_form_of_classes(classes: str, same: bool) -> None:
    assert (skeleton(f'"data":{classes}') == skeleton('"data":["0.5:0","1.5:9"]')) == same
