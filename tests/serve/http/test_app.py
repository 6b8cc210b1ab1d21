"""The HTTP application: versions, tokens, CORS, traces, metrics, and bugs."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from starlette.types import Message, Scope

from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import Float32
from mnist_batchnorm.serve.core.service import InferenceService
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import App
from tests.support.bodies import request
from tests.support.serving import Server, lay, running, until

TOKEN = "0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SITE = "https://a.example"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
INFER = "/v2/models/mnist-bn/infer"


def get(server: Server, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{server.url}{path}", headers=headers, timeout=10)


def post(server: Server, path: str, body: bytes = b"", **headers: str) -> requests.Response:
    return requests.post(f"{server.url}{path}", body, headers=headers, timeout=10)


# --- versions and proof -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unverified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two versions without the gate's report."""
    folder = tmp_path_factory.mktemp("unverified") / "pipeline"
    lay(folder)
    (folder / "reports/parity.json").unlink()
    versions = ("digits=models/bn-folded.onnx", "digits=models/bn.onnx")
    with running("--allow-unverified", *versions, folder=folder) as server:
        yield server


def test_versions_are_served_side_by_side(unverified: Server) -> None:
    first, second = get(unverified, "/v2/models/digits").json()["versions"]
    for path, version in (
        ("", first),
        (f"/versions/{first}", first),
        (f"/versions/{second}", second),
    ):
        answer = post(unverified, f"/v2/models/digits{path}/infer", request())
        assert answer.json()["model_version"] == version


def test_an_unverified_model_is_reported_everywhere(unverified: Server) -> None:
    metadata = get(unverified, "/v2/models/digits").json()
    metrics = get(unverified, "/metrics").text
    warnings = [line for line in unverified.log() if line["level"] == "warning"]

    assert metadata["parameters"]["verified"] is False
    assert "no reports/parity.json" in metadata["parameters"]["unverified_because"]
    assert re.search(r'model_info{.*model="digits".*verified="false".*} 1.0', metrics)
    assert {line["event"] for line in warnings} == {"unverified"}


# --- tokens and other sites ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Server]:
    """A server with a token and CORS, which other machines may reach."""
    (folder / "token").write_text(f"{TOKEN}\n")
    words = ("--host", "0.0.0.0", "--token-file", "token", "--cors", SITE)
    with running(*words, folder=folder) as server:
        yield server


def test_a_token_is_required_and_never_logged(guarded: Server) -> None:
    before = len(guarded.events("rejected"))
    assert get(guarded, "/v2", **BEARER).ok
    for wrong in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}0"}):
        answer = get(guarded, "/v2/models/mnist-bn", **wrong)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "Authorization" in answer.json()["error"]
    assert post(guarded, INFER).status_code == 401
    assert get(guarded, "/metrics").status_code == 401
    assert post(guarded, INFER, request(), **BEARER).ok
    # probes have no token, and a browser shows the page before it can be entered
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"):
        assert get(guarded, path).ok
    assert TOKEN not in json.dumps(guarded.log())
    assert len(guarded.events("rejected")) == before + 5


def test_only_named_sites_get_cors_headers(guarded: Server) -> None:
    allowed = "access-control-allow-origin"
    named = get(guarded, "/v2", **BEARER, Origin=SITE)
    assert named.headers[allowed] == SITE
    assert allowed not in get(guarded, "/v2", **BEARER, Origin="https://b.example").headers
    inferred = post(guarded, INFER, request(), **BEARER, Origin=SITE)
    assert (inferred.status_code, inferred.headers[allowed]) == (200, SITE)


def test_a_server_with_a_token_may_be_behind_a_proxy(guarded: Server) -> None:
    foreign = {"Host": "evil.example", "Origin": "https://evil.example"}
    assert post(guarded, "/v2/repository/index", b"", **BEARER, **foreign).ok


# --- logs and metrics ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a token that logs every request, where another program has metrics."""
    theirs = tmp_path_factory.mktemp("metrics")
    env = {"PROMETHEUS_MULTIPROC_DIR": str(theirs)}
    with running("--access-log", folder=folder, env=env) as server:
        yield server
        assert not list(theirs.iterdir())


def test_the_metrics_of_another_program_are_left_alone(logged: Server) -> None:
    assert "process_resident_memory_bytes" in get(logged, "/metrics").text


def test_control_needs_a_token_on_loopback_too(logged: Server) -> None:
    answer = post(logged, "/v2/repository/models/mnist-bn/unload")
    assert answer.status_code == 403
    assert "--token-file" in answer.json()["error"]


def test_another_host_is_rejected_except_by_health_checks(logged: Server) -> None:
    rebound = {"Host": "evil.example"}
    for path in ("/v2", "/"):
        answer = get(logged, path, **rebound)
        assert answer.status_code == 403
        assert answer.json()["error"].startswith("Host: got evil.example, expected localhost")
    assert get(logged, "/v2/health/ready", **rebound).ok
    index = "/v2/repository/index"
    assert post(logged, index, Origin="https://evil.example").status_code == 403
    assert post(logged, index, Origin=logged.url).ok
    metrics = get(logged, "/metrics").text
    assert 'mnist_bn_rejects_total{model="",reason="host"} 2.0' in metrics
    assert 'mnist_bn_rejects_total{model="",reason="origin"} 1.0' in metrics
    assert "access-control-allow-origin" not in get(logged, "/v2", Origin=SITE).headers


def test_inference_is_logged_with_its_trace(logged: Server) -> None:
    traced = {"X-Request-Id": "inference", "traceparent": TRACE}
    answer = post(logged, INFER, request(), **traced)
    generated = post(logged, INFER, request()).headers
    bad = post(logged, INFER, b"{}", **{**traced, "traceparent": "no"})
    until(lambda: any(line["why"] == bad.json()["error"] for line in logged.events("rejected")))

    headers = answer.headers
    assert (headers["x-request-id"], headers["traceparent"]) == ("inference", TRACE)
    assert "traceparent" not in generated
    by_id = {line["request_id"]: line for line in logged.events("infer")}
    line = by_id["inference"]
    assert (line["model"], line["traceparent"], line["rows"]) == ("mnist-bn", TRACE, 1)
    assert generated["x-request-id"] in by_id
    (rejected,) = (
        line for line in logged.events("rejected") if line.get("request_id") == "inference"
    )
    assert rejected["why"] == bad.json()["error"]
    assert "traceparent" not in rejected


def test_other_requests_are_logged_with_their_trace(logged: Server) -> None:
    headers = get(logged, "/v2", **{"X-Request-Id": "other", "traceparent": TRACE}).headers
    generated = get(logged, "/v2/health/live").headers["x-request-id"]

    def line_of(request_id: str) -> tuple[str, str, int] | None:
        for line in logged.events("answered"):
            if line["request_id"] == request_id:
                return line["method"], line["path"], line["status"]
        return None

    assert (headers["x-request-id"], headers["traceparent"]) == ("other", TRACE)
    until(lambda: line_of(generated))  # a line is written after its answer
    assert line_of("other") == ("GET", "/v2", 200)
    assert line_of(generated) == ("GET", "/v2/health/live", 200)


def test_metrics_and_statistics_count_requests(logged: Server) -> None:
    def stats() -> dict[str, dict[str, object]]:
        rows = get(logged, "/v2/models/stats").json()["model_stats"]
        return {row["name"]: row for row in rows}

    before = stats()["mnist-bn-folded"]
    assert before["last_inference"] == before["inference_stats"]["fail"]["count"] == 0  # type: ignore[index]
    began = time.time()
    for _ in range(3):
        post(logged, INFER.replace("mnist-bn", "mnist-bn-folded"), request())
    post(logged, INFER.replace("mnist-bn", "mnist-bn-folded"), b"{}")
    answered = time.time()
    metrics = get(logged, "/metrics").text
    (stat,) = get(logged, "/v2/models/mnist-bn-folded/stats").json()["model_stats"]

    model, version = 'model="mnist-bn-folded"', f'version="{stat["version"]}"'
    assert f"mnist_bn_requests_total{{{model},{version}}} 3.0" in metrics
    assert f"mnist_bn_rows_total{{{model},{version}}} 3.0" in metrics
    assert f'mnist_bn_rejects_total{{{model},reason="malformed"}} 1.0' in metrics
    assert f'mnist_bn_stage_seconds_count{{{model},stage="infer",{version}}} 3.0' in metrics
    assert (stat["inference_count"], stat["execution_count"]) == (3, 3)
    durations = stat["inference_stats"]
    assert durations["compute_infer"]["ns"] > 0
    assert durations["success"]["count"] == 3
    assert durations["fail"]["count"] == 1
    assert durations["fail"]["ns"] > 0
    assert began * 1000 - 100 <= stat["last_inference"] <= answered * 1000 + 100
    assert stats()["mnist-bn-folded"] == stat


# --- bugs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [ValueError("\udc80"), RecursionError()])
def test_a_bug_is_answered_like_every_error(
    failure: Exception, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    class Broken:
        name = "broken"

        def state(self) -> tuple[object, ...]:
            return ()

        def load(self) -> Model:
            return Model("broken", "1", "0" * 64, None, None, self.run)

        def run(self, images: Float32) -> Float32:
            raise failure

    async def routes(*_: object) -> None:
        raise failure

    async def receive() -> Message:
        return {"type": "http.request", "body": request()}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    metrics = Metrics()
    catalog = Catalog([Broken()], metrics)
    catalog.load()
    app = App(InferenceService(catalog, Settings(), metrics), routes)
    for path in ("/v2/models/broken/infer", "/v2"):
        scope: Scope = {"type": "http", "http_version": "1.0", "method": "POST", "path": path}
        scope["headers"] = []
        asyncio.run(app(scope, receive, send))
    error = {"error": "the server failed; its log says how"}
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [500, 500]
    assert [json.loads(m["body"]) for m in sent if m.get("body")] == [error] * 2
    log = [json.loads(line) for line in capsysbinary.readouterr().err.splitlines()]
    assert [line["event"] for line in log] == ["served", *["failed", "rejected"] * 2]
    assert log[1]["why"] == repr(failure)
