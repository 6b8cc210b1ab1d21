"""The services that other tests stand on do what they say."""

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.support import services
from tests.support.services import Faulty, Server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BLOB = bytes(range(256)) * 20_000  # 5 MB, more than any buffer on the way


def request(
    uri: str, method: str, path: str, body: bytes | None = None, timeout: float = 10
) -> tuple[int, bytes]:
    """The status and body of an answer."""
    connection = http.client.HTTPConnection(urlsplit(uri).netloc, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server with SQLite and a folder for artefacts."""
    folder = tmp_path_factory.mktemp("server")
    with services.mlflow_server(
        f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artefacts"), folder=folder
    ) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Faulty]:
    """A proxy before it that passes everything on."""
    with Faulty(server.uri) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client gives up soon."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def client(uri: str) -> "MlflowClient":
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def log_run(uri: str, folder: Path) -> str:
    """Log a run with a metric and two artefacts through a server; return its id."""
    told = client(uri)
    experiment = told.create_experiment(f"experiment-{time.time_ns()}")
    run_id: str = told.create_run(experiment).info.run_id
    told.log_metric(run_id, "loss", 0.5, step=1)
    folder.mkdir()
    (folder / "blob.bin").write_bytes(BLOB)
    (folder / "empty.txt").touch()
    told.log_artifacts(run_id, str(folder), "files")
    return run_id


def assert_run(uri: str, run_id: str, folder: Path) -> None:
    """What `log_run` logged is there, byte for byte."""
    asked = client(uri)
    assert [(p.step, p.value) for p in asked.get_metric_history(run_id, "loss")] == [(1, 0.5)]
    folder.mkdir()
    asked.download_artifacts(run_id, "files", str(folder))
    assert (folder / "files/blob.bin").read_bytes() == BLOB
    assert (folder / "files/empty.txt").read_bytes() == b""


def test_proxy_hands_a_run_on_byte_for_byte(proxy: Faulty, server: Server, tmp_path: Path) -> None:
    run_id = log_run(proxy.uri, tmp_path / "up")
    assert_run(proxy.uri, run_id, tmp_path / "down")
    stored = [path.read_bytes() for path in server.folder.parent.rglob("blob.bin")]
    assert stored == [BLOB]
    assert proxy.requests[1] == "POST /api/2.0/mlflow/runs/create"


def experiments(uri: str) -> set[str]:
    return {experiment.name for experiment in client(uri).search_experiments()}


def create(uri: str, name: str, timeout: float = 10) -> int:
    body = f'{{"name": "{name}"}}'.encode()
    return request(uri, "POST", "/api/2.0/mlflow/experiments/create", body, timeout)[0]


def test_proxy_answers_500(proxy: Faulty, server: Server) -> None:
    proxy.switch("500")
    assert create(proxy.uri, "failed") == 500
    assert request(proxy.uri, "GET", "/health") == (500, b"")
    # the answer arrives though nobody wants the body
    artefact = "/api/2.0/mlflow-artifacts/artifacts/blob"
    assert request(proxy.uri, "PUT", artefact, BLOB) == (500, b"")
    proxy.switch("pass")
    assert request(proxy.uri, "GET", "/health") == (200, b"OK")
    assert "failed" not in experiments(server.uri)


def test_proxy_refuses(proxy: Faulty, server: Server) -> None:
    proxy.switch("refuse")
    with pytest.raises(ConnectionError):
        create(proxy.uri, "refused")
    assert "refused" not in experiments(server.uri)


def test_proxy_drops_the_answer_to_what_was_done(proxy: Faulty, server: Server) -> None:
    proxy.switch("drop")
    with pytest.raises(ConnectionError):
        create(proxy.uri, "dropped")
    assert "dropped" in experiments(server.uri)


def test_proxy_lets_what_reads_pass_when_the_disk_is_full(proxy: Faulty) -> None:
    proxy.switch("full")
    assert create(proxy.uri, "full") == 507
    assert "full" not in experiments(proxy.uri)


def test_proxy_hangs_until_it_is_switched(proxy: Faulty, server: Server) -> None:
    proxy.switch("hang")
    with pytest.raises(TimeoutError):
        create(proxy.uri, "impatient", timeout=0.3)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(create(proxy.uri, "patient")))
    waiting.start()
    time.sleep(0.3)
    assert answers == []
    proxy.switch("pass")
    waiting.join(10)
    assert answers == [200]
    # who has left gets nothing done later
    assert "impatient" not in experiments(server.uri)


def test_proxy_fails_only_what_it_is_told_to_and_so_often(proxy: Faulty) -> None:
    proxy.switch("500", only=r"^POST .*/experiments/create$", times=1)
    assert request(proxy.uri, "GET", "/health")[0] == 200
    assert create(proxy.uri, "second") == 500
    assert create(proxy.uri, "second") == 200


def test_proxy_ends_with_requests_that_hang(server: Server) -> None:
    failures: list[Exception] = []

    def ask() -> None:
        try:
            create(ending.uri, "for ever", timeout=60)
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    with Faulty(server.uri) as ending:
        ending.switch("hang")
        asking.start()
        deadline = time.monotonic() + 10
        while not ending.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
    asking.join(10)
    assert time.monotonic() - start < 5
    assert failures


def test_proxy_before_nothing_is_a_bad_gateway() -> None:
    with Faulty(f"http://{services.HOST}:{services.free_port()}") as proxy:
        assert request(proxy.uri, "PUT", "/blob", BLOB) == (502, b"")


def test_paused_server_answers_when_it_goes_on(server: Server) -> None:
    server.pause()
    try:
        with pytest.raises(TimeoutError):
            request(server.uri, "GET", "/health", timeout=0.3)
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(request(server.uri, "GET", "/health"))
        )
        waiting.start()
        time.sleep(0.3)
        assert answers == []
    finally:
        server.resume()
    waiting.join(10)
    assert answers == [(200, b"OK")]


def test_killed_server_keeps_its_data(server: Server, proxy: Faulty) -> None:
    assert create(server.uri, "before the power cut") == 200
    server.kill()
    try:
        with pytest.raises(ConnectionError):
            request(server.uri, "GET", "/health")
        assert request(proxy.uri, "GET", "/health")[0] == 502
    finally:
        server.start()
    assert "before the power cut" in experiments(proxy.uri)


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(pytest.fail.Exception, match="nonsense"),
        services.mlflow_server("nonsense://x", str(tmp_path), folder=tmp_path),
    ):
        pass


def test_postgres_keeps_a_run_with_its_artefacts(tmp_path: Path) -> None:
    services.require_postgres()
    with services.postgres(tmp_path) as database:
        artefacts = tmp_path / "artefacts"
        with services.mlflow_server(database, str(artefacts), folder=tmp_path) as server:
            run_id = log_run(server.uri, tmp_path / "up")
            assert_run(server.uri, run_id, tmp_path / "down")
        assert [path.read_bytes() for path in artefacts.rglob("blob.bin")] == [BLOB]

        import psycopg

        plain = database.replace("+psycopg", "")
        with psycopg.connect(plain) as connection:
            found = connection.execute("SELECT run_uuid, value FROM metrics").fetchall()
        assert found == [(run_id, 0.5)]
        pid = next(iter(postmasters(database)))
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(plain, connect_timeout=2)


def postmasters(database: str) -> Iterator[int]:
    """The server's process, by the port in its command line."""
    port = f"port={urlsplit(database).port}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and port in (entry / "cmdline").read_bytes().split(b"\0"):
                yield int(entry.name)


def test_postgres_that_is_missing_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "postgres_programs", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="apt-get install postgresql"):
        services.require_postgres()


def test_bucket_gives_back_what_it_got() -> None:
    with services.s3("first") as store:
        assert store.objects() == {}
        store.put("folder/blob.bin", BLOB)
        assert store.objects() == {"folder/blob.bin": BLOB}
    with services.s3("first") as store:
        assert store.objects() == {}


def test_environment_of_a_service_has_no_keys_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert "AWS_PROFILE" not in services.isolated()
    assert services.isolated(AWS_REGION="x")["AWS_REGION"] == "x"
    assert services.isolated()["PATH"].endswith(os.environ["PATH"])
