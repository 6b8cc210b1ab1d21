"""The benchmark of servers asks, checks, counts and tells what it says it does."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from benchmarks.serving import CELLS, Benchmark, Options, Work, as_json, parse_arguments
from benchmarks.serving_contenders import (
    CONTENDERS,
    KSERVE,
    MLFLOW,
    NULL,
    OURS,
    Contender,
    Place,
    UnavailableError,
    closure,
    environment,
    pinned,
)
from benchmarks.serving_load import Load, LoadError, load, parse, quoted, write_script
from benchmarks.serving_processes import Launch, Server, StartError, free_port
from benchmarks.serving_table import TARGETS, Cell, Measured, Result, disturbance, report
from benchmarks.serving_wire import (
    BINARY,
    JSON,
    Answer,
    AnswerError,
    Dialect,
    MlflowScoring,
    OpenInference,
    OwnModels,
    RefusalError,
    Request,
    SameSize,
    ask,
    check,
    numbers,
)

from benchmarks import serving, serving_contenders, serving_processes
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import TEST_SPLIT

IMAGES = np.array([[0.0, 1.0, 1 / 255, 128 / 255] * 196] * 2, np.float32)
LOGITS = np.linspace(-7.3, 9.1, 20, dtype=np.float32).reshape(2, 10)


# --- requests and answers -------------------------------------------------------------------------


def test_numbers_are_short_and_exact() -> None:
    values = np.array([0, 1, 1 / 255, 128 / 255, 1e-9], np.float32)
    text = numbers(values)
    assert text == "[0.0,1.0,0.003921569,0.5019608,1e-09]"
    assert np.array_equal(np.array(json.loads(text), np.float32), values)


def test_json_request_holds_the_images() -> None:
    request = OpenInference("m").request(IMAGES, LOGITS, JSON)
    (tensor,) = json.loads(request.body)["inputs"]
    assert (request.path, tensor["datatype"], tensor["shape"]) == (
        "/v2/models/m/infer",
        "FP32",
        [2, 784],
    )
    assert np.array_equal(np.float32(tensor["data"]).reshape(2, 784), IMAGES)
    for dialect, key in ((MlflowScoring(), "inputs"), (OwnModels(), "images")):
        body = json.loads(dialect.request(IMAGES, LOGITS, JSON).body)
        assert np.array_equal(np.float32(body[key]), IMAGES)


def test_binary_request_holds_the_images() -> None:
    request = OpenInference("m").request(IMAGES, LOGITS, BINARY)
    length = int(request.headers["Inference-Header-Content-Length"])
    head = json.loads(request.body[:length])
    assert head["inputs"][0]["parameters"] == {"binary_data_size": IMAGES.nbytes}
    assert head["parameters"] == {"binary_data_output": True}
    assert request.body[length:] == IMAGES.tobytes()


def answered(dialect: Dialect, logits: Any, form: str) -> Answer:
    if form == BINARY:
        head = json.dumps(
            {"outputs": [{"name": "logits", "datatype": "FP32", "shape": list(logits.shape)}]}
        ).encode()
        length = {"inference-header-content-length": str(len(head))}
        return Answer(200, length, head + logits.tobytes())
    lists = logits.tolist()
    flat = {
        "name": "logits",
        "datatype": "FP32",
        "shape": [*logits.shape],
        "data": logits.ravel().tolist(),
    }
    body = {
        OpenInference: {"outputs": [flat]},
        MlflowScoring: {"predictions": {"logits": lists}},
        OwnModels: {"logits": lists},
    }[type(dialect)]
    return Answer(200, {}, json.dumps(body).encode())


DIALECTS = [
    (OpenInference("m"), JSON),
    (OpenInference("m"), BINARY),
    (MlflowScoring(), JSON),
    (OwnModels(), JSON),
]


@pytest.mark.parametrize(("dialect", "form"), DIALECTS)
def test_answers_are_compared_with_the_logits(dialect: Dialect, form: str) -> None:
    dialect.check(answered(dialect, LOGITS, form), LOGITS, form)
    rounded = LOGITS * np.float32(1 + 1e-7)
    dialect.check(answered(dialect, rounded, form), LOGITS, form)
    off = LOGITS.copy()
    off[1, 3] += 1e-3
    with pytest.raises(AnswerError, match=r"off by 1\.1e-04 of the largest"):
        dialect.check(answered(dialect, off, form), LOGITS, form)
    with pytest.raises(AnswerError, match="off by"):
        dialect.check(answered(dialect, LOGITS[::-1].copy(), form), LOGITS, form)
    off[1, 3] = np.nan
    with pytest.raises(AnswerError, match="off by nan"):
        dialect.check(answered(dialect, off, form), LOGITS, form)
    with pytest.raises(AnswerError, match=r"shape \(1, 10\), expected \(2, 10\)"):
        dialect.check(answered(dialect, LOGITS[:1], form), LOGITS, form)


def test_other_form_or_tensor_is_no_answer() -> None:
    dialect = OpenInference("m")
    for asked, got in ((JSON, BINARY), (BINARY, JSON)):
        with pytest.raises(AnswerError, match="another form"):
            dialect.check(answered(dialect, LOGITS, got), LOGITS, asked)
    other = answered(dialect, LOGITS, JSON)
    renamed = Answer(200, {}, other.body.replace(b'"logits"', b'"image"'))
    with pytest.raises(AnswerError, match="it answers image"):
        dialect.check(renamed, LOGITS, JSON)


@pytest.mark.parametrize("form", [JSON, BINARY])
def test_null_handler_is_asked_for_as_many_bytes(form: str) -> None:
    dialect = SameSize(OpenInference("m"))
    request = dialect.request(IMAGES, LOGITS, form)
    assert request.body == OpenInference("m").request(IMAGES, LOGITS, form).body
    size = int(request.path.removeprefix("/"))
    body = {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [2, 10]}],
    }
    text = json.dumps(body, separators=(",", ":"))
    if form == JSON:
        assert size == len(text) + len(',"data":') + len(numbers(LOGITS.ravel()))
    else:
        assert size == len(text) + len(',"parameters":{"binary_data_size":80}') + LOGITS.nbytes
    dialect.check(Answer(200, {}, json.dumps("x" * (size - 2)).encode()), LOGITS, form)
    with pytest.raises(AnswerError, match=f"{size - 1} bytes, expected a string of {size}"):
        dialect.check(Answer(200, {}, json.dumps("x" * (size - 3)).encode()), LOGITS, form)


# --- wrk ------------------------------------------------------------------------------------------


def test_load_is_what_wrk_says() -> None:
    figures = '{"requests":250,"seconds":2.5,"p50":1.5,"p99":9,"errors":{"status":3,"read":0}}'
    assert parse(f"Running 2s test\nMEASURED {figures}\n") == Load(250, 2.5, 1.5, 9, {"status": 3})
    with pytest.raises(LoadError, match="unable to connect"):
        parse("unable to connect to 127.0.0.1")


def test_strings_of_lua() -> None:
    assert quoted('a"b\\c\n') == '"a\\"b\\\\c\\n"'


class Echo(http.server.BaseHTTPRequestHandler):
    """Counts bodies, and answers the status that is asked for."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, bytes, str | None]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body, self.headers["X-Kind"]))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[tuple[int, type[Echo]]]:
    handler = type("Handler", (Echo,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port, handler
        server.shutdown()
        thread.join()


needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk: apt-get install wrk")


@needs_wrk
def test_wrk_sends_all_requests_and_counts_errors(
    tmp_path: Path, echo: tuple[int, type[Echo]]
) -> None:
    port, handler = echo
    requests = [
        Request(f"/{number}", {"X-Kind": f'"{number}"'}, bytes([number, 0, 10, 13, 255]) * 100)
        for number in range(3)
    ]
    core = min(os.sched_getaffinity(0))
    script = write_script(tmp_path, requests)
    seen = load(port, script, 2, 1, core)
    expected = {(one.path, one.body, one.headers["X-Kind"]) for one in requests}
    assert set(handler.seen) == expected
    assert 0 < seen.requests <= len(handler.seen)
    assert 0 < seen.p50 <= seen.p99
    assert seen.errors == {}
    handler.status = 503
    assert load(port, script, 1, 1, core).errors["status"] > 0


@needs_wrk
def test_nobody_there(tmp_path: Path) -> None:
    script = write_script(tmp_path, [Request("/", {}, b"")])
    with pytest.raises(LoadError, match="unable to connect"):
        load(free_port(), script, 1, 1, min(os.sched_getaffinity(0)))


# --- processes ------------------------------------------------------------------------------------

# Refuses twice, then answers the logits it is given, as a child of the process that was started.
SERVER = """\
import http.server, json, os, sys
port, logits = int(sys.argv[1]), json.loads(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    refused = 0
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Handler.refused += 1
        body = json.dumps({"logits": logits}).encode()
        self.send_response(503 if Handler.refused < 3 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
if os.fork():
    os.wait()
else:
    held = bytes(20_000_000)
    sum(range(2_000_000))
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def launch(folder: Path, code: str, *arguments: str) -> Launch:
    return Launch([sys.executable, "-S", "-c", code, *arguments], {}, folder)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, Any], Server]]:
    servers: list[Server] = []

    def make(code: str, logits: Any) -> Server:
        port = free_port()
        arguments = str(port), json.dumps(logits.tolist())
        core = min(os.sched_getaffinity(0))
        servers.append(Server(launch(tmp_path, code, *arguments), port, core, tmp_path / "log"))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def test_server_is_measured_with_its_children(start: Callable[[str, Any], Server]) -> None:
    server = start(SERVER, LOGITS)
    assert 0 < server.wait(OwnModels(), IMAGES, LOGITS) < 60
    check(server.port, OwnModels(), IMAGES, LOGITS, JSON)
    assert len(list(server.processes())) == 2
    assert server.memory() > 20_000_000
    assert server.cpu() > 0
    server.settle()
    server.stop()
    assert not list(server.processes())
    with pytest.raises(OSError, match="refused"):
        ask(server.port, Request("/", {}, b""))


def test_wrong_server_is_not_waited_for(start: Callable[[str, Any], Server]) -> None:
    with pytest.raises(AnswerError, match="off by"):
        start(SERVER, LOGITS + 1).wait(OwnModels(), IMAGES, LOGITS)


def test_server_that_ends_says_why(start: Callable[[str, Any], Server]) -> None:
    with pytest.raises(StartError, match=r"status 3\nno such model"):
        start("import sys; print('no such model'); sys.exit(3)", LOGITS).wait(
            OwnModels(), IMAGES, LOGITS
        )


def test_refusal_is_told_from_a_wrong_answer(echo: tuple[int, type[Echo]]) -> None:
    port, handler = echo
    handler.status = 500
    with pytest.raises(RefusalError, match="it answers 500"):
        check(port, OwnModels(), IMAGES, LOGITS, JSON)
    handler.status = 200
    with pytest.raises(AnswerError, match="not understood"):
        check(port, OwnModels(), IMAGES, LOGITS, JSON)


# --- environments ---------------------------------------------------------------------------------


def test_pinned_environments_are_exact() -> None:
    for name, package in (("kserve", "kserve"), ("mlserver", "mlserver"), ("fastapi", "fastapi")):
        versions = pinned(name)
        assert {package, "onnxruntime", "numpy"} <= versions.keys()
        assert all(versions.values())
    assert pinned("triton")["numpy"].startswith("1.")


def test_closure_follows_requirements_of_this_environment() -> None:
    core = closure(["mnist-batchnorm"])
    assert {"mnist-batchnorm", "click", "numpy"} <= core
    assert core.isdisjoint({"mlflow", "starlette", "uvloop"})
    with_server = closure(["mnist-batchnorm"], frozenset({"serve"}))
    assert with_server - core >= {"starlette", "onnxruntime", "uvloop", "httptools"}
    assert closure(["no-such-package"]) == set()


def fake_uv(folder: Path, status: int) -> None:
    folder.mkdir()
    program = folder / "uv"
    program.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            echo "$@" >> {folder}/calls
            test "$1" = venv && for last; do :; done && mkdir -p "$last/bin"
            echo "no matching distribution" >&2
            exit {status}
            """)
    )
    program.chmod(0o755)


@pytest.fixture
def rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "rivals"
    folder.mkdir()
    (folder / "kserve.txt").write_text("kserve==0.1\n")
    monkeypatch.setattr(serving_contenders, "RIVALS", folder)
    monkeypatch.setattr(serving_contenders, "programs", lambda: tmp_path / "uv")
    return folder


def test_environment_is_made_once_for_its_requirements(tmp_path: Path, rivals: Path) -> None:
    fake_uv(tmp_path / "uv", 0)
    calls = tmp_path / "uv/calls"
    made = environment("kserve", tmp_path / "cache")
    assert made == tmp_path / "cache/kserve/bin"
    venv, install = calls.read_text().splitlines()
    assert venv.startswith("venv ")
    assert install.endswith(f"-r {rivals / 'kserve.txt'}")
    assert environment("kserve", tmp_path / "cache") == made
    assert len(calls.read_text().splitlines()) == 2
    (rivals / "kserve.txt").write_text("kserve==0.2\n")
    environment("kserve", tmp_path / "cache")
    assert len(calls.read_text().splitlines()) == 4


@pytest.mark.usefixtures("rivals")
def test_environment_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_uv(tmp_path / "uv", 1)
    for _ in range(2):  # a failed one does not count as made
        with pytest.raises(UnavailableError, match=r"kserve\.txt could not be installed"):
            environment("kserve", tmp_path / "cache")
    assert "no matching distribution" in capsys.readouterr().err


def test_triton_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, tmp_path / "bn.onnx", tmp_path, tmp_path)
    monkeypatch.delenv("MNIST_BN_TRITONSERVER", raising=False)
    with pytest.raises(UnavailableError, match="no `tritonserver` named"):
        CONTENDERS["Triton"](place)
    monkeypatch.setenv("MNIST_BN_TRITONSERVER", str(tmp_path / "gone"))
    with pytest.raises(UnavailableError, match="does not name a file"):
        CONTENDERS["Triton"](place)


# --- tables ---------------------------------------------------------------------------------------


def measured(*rates: float, p99: float = 2.0, errors: Mapping[str, int] | None = None) -> list[Any]:
    return [
        Measured(Load(round(one * 2), 2.0, 1.0, p99, dict(errors or {})), cpu=0.5, others=0.02)
        for one in rates
    ]


def result(rates: Mapping[Cell, float], *, p99: float = 2.0, forms: Any = (JSON, BINARY)) -> Result:
    return Result(
        "some package",
        forms,
        packages=5,
        starts=[0.4, 0.5, 9.0],
        memory=[100_000_000, 90_000_000, 120_000_000],
        cells={cell: measured(rate / 2, rate, rate * 9, p99=p99) for cell, rate in rates.items()},
    )


def results(ours: float, p99: float = 2.0) -> dict[str, Result]:
    return {
        OURS: result(dict.fromkeys(CELLS, ours), p99=p99),
        NULL: result(dict.fromkeys(CELLS, 20_000.0)),
        KSERVE: result(dict.fromkeys(CELLS, 1_000.0)),
        MLFLOW: result({c: 500.0 for c in CELLS if c.form == JSON}, forms=(JSON,)),
    }


def row(text: str, start: str, number: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return lines[number].strip("| ").split(" | ")


def test_tables_show_medians_and_ratios() -> None:
    text = report(results(12_000.0))
    cell = "JSON, 1 image, c=8"
    assert row(text, cell)[1:] == ["12,000", "20,000", "1,000", "500"]
    assert row(text, cell, 1)[1:] == ["0.60\u00d7", "12\u00d7", "24\u00d7"]
    assert row(text, cell, 2)[1:] == ["1.00 / 2.00"] * 4
    # 0.5 s for 24,000 requests in the median round
    assert row(text, cell, 3)[1] == "21"
    assert row(text, "binary, 32 images, c=64")[-1] == "\u2013"
    assert row(text, OURS)[1:] == ["some package", "0.50", "100", "5"]


def verdicts(measured_results: dict[str, Result]) -> list[str]:
    return [target.row(measured_results)[-1] for target in TARGETS]


def test_targets_pass_or_miss() -> None:
    assert verdicts(results(12_000.0)) == ["pass"] * len(TARGETS)
    # 0.3 of null and 6 of KServe, but 12 of mlflow
    slow = results(6_000.0, p99=8.1)
    missed = [t.figure for t in TARGETS if t.row(slow)[-1] == "**miss**"]
    assert missed == [
        "JSON, 1 image, c=8: to null uvicorn",
        "JSON, 1 image, c=8: to KServe SDK",
        "JSON, 1 image, c=64: to null uvicorn",
        "JSON, 1 image, c=64: to KServe SDK",
        "binary, 1 image, c=64: to null uvicorn",
        "binary, 1 image, c=64: to KServe SDK",
        "JSON, 1 image, c=64: p99",
    ]
    heavy = results(12_000.0)
    heavy[OURS].starts, heavy[OURS].memory = [1.01], [150_100_000]
    assert verdicts(heavy)[-2:] == ["**miss**"] * 2


def test_failed_request_leaves_no_figure() -> None:
    broken = results(12_000.0)
    cell = CELLS[1]
    broken[OURS].cells[cell] += measured(12_000.0, errors={"status": 2, "read": 1})
    text = report(broken)
    assert row(text, str(cell))[1] == "**failed**: 2 status, 1 read"
    assert row(text, f"{cell}: to null uvicorn")[-1] == "not measured"
    broken[OURS].cells[cell] = measured(0.0)
    assert row(report(broken), str(cell))[1] == "no answer in time"


def test_missing_server_is_named_with_the_reason() -> None:
    partial = results(12_000.0)
    partial[KSERVE] = Result("", missing="kserve.txt could not be installed")
    text = report(partial)
    assert row(text, KSERVE)[1] == "**not measured: kserve.txt could not be installed**"
    assert KSERVE not in text.splitlines()[2]
    assert row(text, "JSON, 1 image, c=8: to KServe SDK")[-1] == "not measured"
    assert row(text, "JSON, 1 image, c=8: to mlflow")[-1] == "pass"


def test_few_requests_are_marked() -> None:
    few = results(12_000.0)
    few[MLFLOW].cells[CELLS[0]] = measured(100.0)
    assert row(report(few), str(CELLS[0]), 2)[1:] == [*["1.00 / 2.00"] * 3, "1.00 / 2.00 ¹"]


def test_disturbance_is_the_share_of_others() -> None:
    noisy = results(1.0)
    noisy[OURS].cells[CELLS[0]][0] = Measured(Load(1, 2.0, 1, 1, {}), cpu=0.1, others=1.5)
    assert disturbance(noisy) == (0.01, 0.75)


def test_json_holds_every_round() -> None:
    content = json.loads(json.dumps(as_json(results(12_000.0), {"rounds": 3})))
    ours = content["servers"][OURS]
    assert ours["start_seconds"] == [0.4, 0.5, 9.0]
    cell = ours["cells"][0]
    assert (cell["form"], cell["images"], cell["connections"]) == (JSON, 1, 1)
    assert [one["load"]["requests"] for one in cell["rounds"]] == [12_000, 24_000, 216_000]


# --- the whole ------------------------------------------------------------------------------------


def test_arguments() -> None:
    assert (parse_arguments([]).rounds, parse_arguments([]).seconds) == (3, 3)
    quick = parse_arguments(["--quick", "--only", OURS])
    assert (quick.rounds, quick.seconds, quick.only) == (1, 1, [OURS])
    for wrong in (["--rounds", "0"], ["--seconds", "0"], ["--only", "nginx"]):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments(wrong)


def test_without_wrk_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["serving", "--quick"])
    assert serving.main() == 2
    assert capsys.readouterr().err == (
        "error: no `wrk` on the PATH; on Debian and Ubuntu: apt-get install wrk\n"
    )


def test_one_core_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_wrk", lambda: "wrk")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    with pytest.raises(UserError, match=r"must be two cores of those .*: 0, 2"):
        serving.check_machine(Options(server_core=0, load_core=1))
    with pytest.raises(UserError, match="must be two cores"):
        serving.check_machine(Options(server_core=0, load_core=0))


ANSWERS = """\
import http.server, json, sys
port, logits = int(sys.argv[1]), json.loads(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answered = 0
    def do_POST(self):
        images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"]
        body = json.dumps({"logits": [logits for _ in images]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def work() -> Work:
    """Requests whose logits are all the same."""
    images = np.zeros((serving.REQUESTS * 32, 784), np.float32)
    one = Work(images, Path("no.onnx"))
    batches = {
        size: [(images[:size], np.tile(LOGITS[:1], (size, 1)))] * serving.REQUESTS
        for size in serving.IMAGES
    }
    vars(one)["batches"] = batches  # where the cached property keeps them
    return one


def contender(name: str, folder: Path, code: str, logits: Any) -> Contender:
    arguments = json.dumps(logits.tolist())
    return Contender(
        name, "v1", OwnModels(), lambda port: launch(folder, code, str(port), arguments), 0
    )


@needs_wrk
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_rivals_that_are_wrong_or_do_not_start_are_left_out(
    tmp_path: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    server_core, load_core = sorted(os.sched_getaffinity(0))[:2]
    options = Options(1, 1, server_core, load_core, [Cell(JSON, 1, 1), Cell(BINARY, 1, 1)])
    right = contender(OURS, tmp_path, ANSWERS, LOGITS[0])
    absent = contender("absent", tmp_path, "raise SystemExit('no GPU')", LOGITS[0])
    benchmark = Benchmark([right, absent], work, options)
    benchmark.run()
    assert benchmark.results["absent"].missing == "it does not start"
    assert "no GPU" in capsys.readouterr().err
    assert not benchmark.wrong
    ours = benchmark.results[OURS]
    assert list(ours.cells) == [options.cells[0]]
    assert ours.cells[options.cells[0]][0].load.requests > 0
    assert len(ours.starts) == len(ours.memory) == 1

    wrong = contender("wrong", tmp_path, ANSWERS, LOGITS[1])
    benchmark = Benchmark([wrong], work, options)
    benchmark.run()
    assert benchmark.wrong
    assert "off by" in (benchmark.results["wrong"].missing or "")
    assert benchmark.results["wrong"].cells == {}


def test_this_server_must_be_right(tmp_path: Path, work: Work) -> None:
    core = min(os.sched_getaffinity(0))
    options = Options(1, 1, core, core)
    ours = contender(OURS, tmp_path, ANSWERS, LOGITS[1])
    with pytest.raises(UserError, match=f"{OURS}: its logits are off by"):
        Benchmark([ours], work, options).run()


def test_server_that_ignores_sigterm_is_killed(
    start: Callable[[str, Any], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_processes, "STOP_LIMIT", 0.1)
    server = start("import signal; signal.signal(15, signal.SIG_IGN)\n" + SERVER, LOGITS)
    server.wait(OwnModels(), IMAGES, LOGITS)
    server.stop()
    assert not list(server.processes())


def test_null_handler_answers_what_it_is_asked_for(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, tmp_path, tmp_path)
    null = CONTENDERS[NULL](place)
    port = free_port()
    server = Server(null.launch(port), port, min(os.sched_getaffinity(0)), tmp_path / "log")
    try:
        server.wait(null.dialect, IMAGES, LOGITS)
        for form in (JSON, BINARY):
            check(port, null.dialect, IMAGES, LOGITS, form)
    finally:
        server.stop()


@pytest.mark.slow
@needs_wrk
def test_whole_table(tmp_path: Path) -> None:
    root = Path(serving.__file__).resolve().parents[1]
    if not (root / serving.MODEL_FILE).exists() or not (root / TEST_SPLIT).exists():
        pytest.skip("needs `dvc repro`")
    figures = tmp_path / "figures.json"
    only = [word for name in (OURS, NULL, MLFLOW) for word in ("--only", name)]
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--json", str(figures)]
    done = subprocess.run(
        [*command, *only],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    servers = json.loads(figures.read_text())["servers"]
    assert [len(servers[name]["cells"]) for name in (OURS, NULL, MLFLOW)] == [12, 12, 6]
    assert "Promised:" in done.stdout
