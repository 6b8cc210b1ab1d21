"""The server takes models from MLflow's registry, by a process of its own, and follows it there."""

import contextlib
import itertools
import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.artifacts.goldens import GOLDEN_IMAGES
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import MODELS
from mnist_batchnorm.parity import Check, runtime
from mnist_batchnorm.serve.registry import child, supervisor
from mnist_batchnorm.serve.registry.child import Registry, SourceUpdater, StoreReplacedError
from mnist_batchnorm.serve.registry.source import Address, Current, Fetched, RegisteredSource
from tests.conftest import ROOT, MnistBn
from tests.support import commands, registered, services, store
from tests.support.candidates import ALIKE, GOOD, shifted
from tests.support.finished import PASSED, write_parity
from tests.support.serving import Server

NETWORKS = {"1": GOOD, "2": shifted(ALIKE)}
CHAMPION = "models:/mnist-bn@champion"
TOKEN = "of-this-test-0123456789"
FETCHER = "mnist_batchnorm.serve.registry.child"
# as the console script, and leaves behind what was imported
PROGRAM = """\
import atexit, sys
from pathlib import Path
atexit.register(lambda: Path("imported.txt").write_text("\\n".join(sys.modules)))
from mnist_batchnorm.cli import main
main()
"""


# ------------------------------------------------------------------------- a server, and its store


class Serving(Server):
    """A server that runs, and whose models the test knows."""

    def __init__(self, command: commands.Command) -> None:
        """Wait until it serves."""
        super().__init__(command)
        self.command = command

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that happens while it runs."""

        def holds(_: commands.Command) -> bool:
            time.sleep(0.05)
            return bool(condition())

        self.command.until(holds)

    def get(self, path: str) -> str:
        """Return what it says at a path."""
        head = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(self.url + path, headers=head)
        with urllib.request.urlopen(request, timeout=commands.PATIENCE) as answer:
            text: str = answer.read().decode()
        return text

    def infer(self, image: np.ndarray, model: str = "mnist-bn") -> tuple[str, np.ndarray]:
        """Return the version that answers and its logits."""
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 784], "data": image.tolist()}
        body = json.dumps({"inputs": [tensor]}).encode()
        url, head = f"{self.url}/v2/models/{model}/infer", {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(url, body, head)
        with urllib.request.urlopen(request, timeout=commands.PATIENCE) as answer:
            content = json.loads(answer.read())
        logits = np.array(content["outputs"][0]["data"], np.float32)
        return content["model_version"], logits

    def version(self, model: str = "mnist-bn") -> str:
        """The version that answers by default, whose logits must be that version's."""
        image = an_image()
        version, logits = self.infer(image[0], model)
        graph = NETWORKS[version].graph(folded="folded" in model)
        assert np.array_equal(logits, runtime.load(graph).run(image)[0]), version
        return version


def an_image() -> np.ndarray:
    """A digit, float32 ``[1, 784]``."""
    return network_input(load_split(ROOT / GOLDEN_IMAGES).images[:1])


@contextlib.contextmanager
def serving(folder: Path, *words: str, **env: str) -> Iterator[Serving]:
    """A server on a free port that looks for changes several times a second, until it is ready."""
    often = ("--watch", "0.1", "--watch-registry", "0.1", "--drain-delay", "0")
    program = (sys.executable, "-c", PROGRAM, "serve", *words, "--port", "0", *often)
    with commands.running(folder, *program, env=commands.environment(**env)) as command:
        yield Serving(command)


@pytest.fixture(scope="module")
def results(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, the second is champion, in a folder's own database."""
    folder = tmp_path_factory.mktemp("registered") / "results"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        store.use_settings(patch)
        registered.prepare(folder, prepared, params)
        registered.register(folder, NETWORKS)
    return folder


@pytest.fixture
def folder(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to change at will, but for the artefacts, which stay where MLflow put them."""
    store.use_settings(monkeypatch)
    there = tmp_path / "project"
    shutil.copytree(results, there, ignore=shutil.ignore_patterns("mlartifacts"))
    monkeypatch.chdir(there)
    return there


@contextlib.contextmanager
def artefact(folder: Path, number: int) -> Iterator[Path]:
    """The ONNX file of a version of mnist-bn as MLflow keeps it, put back afterwards."""
    version = store.client(folder).get_model_version("mnist-bn", str(number))
    model = store.client(folder).get_logged_model(version.source.removeprefix("models:/"))
    (path,) = Path(model.artifact_location.removeprefix("file://")).glob("*.onnx")
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def move(folder: Path, number: int, alias: str = "champion") -> None:
    """Move an alias of mnist-bn."""
    store.client(folder).set_registered_model_alias("mnist-bn", alias, str(number))


# ------------------------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (CHAMPION, Address("mnist-bn", "champion", None)),
        ("models:/mnist-bn/12", Address("mnist-bn", None, "12")),
        ("models:/main.vision.digits@a_b-c", Address("main.vision.digits", "a_b-c", None)),
        ("models:/a=b c/1", Address("a=b c", None, "1")),
    ],
)
def test_address(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "models:/",
        "models:/mnist-bn",
        "models:/mnist-bn/latest",
        "models:/mnist-bn/Production",
        "models:/mnist-bn/0",
        "models:/mnist-bn/1/model.onnx",
        "models:/mnist-bn@",
        "models:/mnist-bn@champion\n",
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(UserError, match=r"expected models:/NAME@ALIAS or models:/NAME/VERSION"):
        Address.parse(text)


# ----------------------------------------------------------------- what a server does with a folder


FETCHED_ONNX, FETCHED_PARITY = Path("7/model.onnx"), Path("7/parity.json")


@pytest.fixture
def fetched(project: Path, prepared: Path) -> Fetched:
    """A version in a folder, as it was fetched."""
    shutil.copytree(prepared, project / "data/prepared")
    GOOD.write()
    GOOD.write_plain()
    (MODELS / "bn.safetensors").write_bytes(b"weights")
    FETCHED_ONNX.parent.mkdir()
    shutil.copy(MODELS / "bn.onnx", FETCHED_ONNX)
    write_fetched_parity(PASSED)
    return Fetched("7", "3", sha256(FETCHED_ONNX.read_bytes()).hexdigest(), None)


def write_fetched_parity(checks: list[Check]) -> None:
    write_parity(Path(), checks)
    shutil.copy("reports/parity.json", FETCHED_PARITY)


def source(*, allow_unverified: bool = False) -> RegisteredSource:
    return RegisteredSource("digits", Address.parse(CHAMPION), Path(), allow_unverified)


def test_source_loads_what_was_fetched(fetched: Fetched) -> None:
    Current(fetched).write(Path())
    assert Current.read(Path()) == Current(fetched)
    model = source().load()
    assert (model.name, model.version, model.sha256) == ("digits", "3", fetched.sha256)
    assert model.verified


def test_source_state_changes_with_what_is_said(fetched: Fetched) -> None:
    one = source()
    states = [one.state()]
    for said in (Current(fetched), Current(fetched, "no"), Current(fetched)):
        said.write(Path())
        states.append(one.state())
    assert all(before != after for before, after in itertools.pairwise(states))


def test_refused_version_leaves_the_one_before(fetched: Fetched) -> None:
    Current(fetched).write(Path())
    running = source()
    running.load()
    Current(fetched, "version 8 is not served").write(Path())
    with pytest.raises(CheckFailedError, match="version 8 is not served"):
        running.load()
    started_anew = source()
    assert started_anew.load().version == "3"
    with pytest.raises(CheckFailedError, match="version 8 is not served"):  # when asked to look
        started_anew.load()
    Current(fetched).write(Path())
    assert running.load().version == "3"


def test_refused_from_the_start(project: Path) -> None:
    assert project
    with pytest.raises(UserError, match="has not been fetched"):
        source().load()
    Current(None, "version 8 is not served").write(Path())
    with pytest.raises(CheckFailedError, match="version 8 is not served"):
        source().load()


def test_unproven_is_refused_or_said(fetched: Fetched) -> None:
    reasons = {}
    Current(replace(fetched, unreported="it belongs to no run")).write(Path())
    reasons["it belongs to no run"] = Current.read(Path()).fetched
    write_fetched_parity([Check("weights", "failed", "")])
    reasons["its run's parity.json says: no parity"] = fetched
    other = replace(fetched, sha256="0" * 64)
    reasons["its run's parity.json is about other files"] = other
    for why, one in reasons.items():
        assert one
        Current(one).write(Path())
        with pytest.raises(CheckFailedError) as refused:
            source().load()
        assert why in str(refused.value)
        assert f"{CHAMPION} (version 7 in MLflow) is not served" in str(refused.value)
        if one is not other:
            model = source(allow_unverified=True).load()
            assert why in str(model.unproven)


def test_proven_file_that_computes_something_else_here_is_refused(fetched: Fetched) -> None:
    report = json.loads(FETCHED_PARITY.read_text())
    report["goldens"]["logits"]["bn.onnx"][0][0] += 1
    FETCHED_PARITY.write_text(json.dumps(report))
    Current(fetched).write(Path())
    with pytest.raises(
        CheckFailedError, match=r"golden images of its run's parity\.json .* off by"
    ):
        source().load()
    assert "are off by" in str(source(allow_unverified=True).load().unproven)


def test_file_that_is_altered_after_it_was_fetched_is_refused(fetched: Fetched) -> None:
    Current(fetched).write(Path())
    FETCHED_ONNX.write_bytes(shifted(ALIKE).graph(folded=False))
    with pytest.raises(CheckFailedError, match="about other files"):
        source().load()


def test_fetched_file_that_is_no_model_is_named_by_its_address(fetched: Fetched) -> None:
    FETCHED_ONNX.write_bytes(b"no model")
    digest = sha256(b"no model").hexdigest()
    store.edit(FETCHED_PARITY, fetched.sha256, digest)
    with pytest.raises(UserError, match=r"models:/mnist-bn@champion \(version 7 in MLflow\) is no"):
        source().load_version(replace(fetched, sha256=digest))


# ------------------------------------------------------------------------- what is read from MLflow


def updater(address: str = CHAMPION, *, allow_unverified: bool = False) -> SourceUpdater:
    place = Path("fetched")
    place.mkdir(exist_ok=True)
    return SourceUpdater(
        RegisteredSource("mnist-bn", Address.parse(address), place, allow_unverified)
    )


def served() -> str | None:
    """The version that a follower says is to be served."""
    current = Current.read(Path("fetched"))
    return current.fetched.version if current.fetched else None


def test_follower_fetches_what_an_alias_means(folder: Path, mnist_bn: MnistBn) -> None:
    one, registry = updater(), Registry(folder)
    steps: dict[tuple[str, ...], str] = {
        (): "2",
        ("promote", "1", "--override", "to compare them"): "1",
        ("rollback",): "2",
    }
    for command, number in steps.items():
        assert not command or mnist_bn(*command).status == 0
        one.update(registry)
        current = Current.read(Path("fetched"))
        assert current.refused is None
        assert current.fetched
        onnx = one.source.onnx(current.fetched.number)
        assert onnx.read_bytes() == NETWORKS[number].graph(folded=False)
        assert served() == number
    assert len([place for place in Path("fetched").iterdir() if place.is_dir()]) == 2


def test_look_at_a_version_that_is_there_is_one_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, registry = updater(), Registry(folder)
    one.update(registry)
    said = Path("fetched/current.json").stat()
    monkeypatch.setattr(Registry, "fetch", lambda *_: pytest.fail("it is there"))
    one.update(registry)
    assert Path("fetched/current.json").stat() == said


def test_version_that_clients_see_is_the_ledgers(folder: Path) -> None:
    client = store.client(folder)
    second = client.get_model_version("mnist-bn", "2")
    again = client.create_model_version(
        "mnist-bn", second.source, run_id=second.run_id, tags=second.tags
    )
    updater(f"models:/mnist-bn/{again.version}").update(Registry(folder))
    assert (again.version, served()) == (3, "2")
    client.delete_model_version_tag("mnist-bn", "3", "mnist_bn.version")
    move(folder, 3)
    shutil.rmtree("fetched")
    updater().update(Registry(folder))
    assert served() == "3"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("models:/mnist-bn@nobody", "alias nobody not found"),
        ("models:/nothing@champion", "name=nothing not found"),
        ("models:/mnist-bn/99", "version=99"),
    ],
)
def test_what_is_not_registered(folder: Path, address: str, why: str) -> None:
    problem = child.fetch_all([updater(address)], Registry(folder))
    assert str(problem).startswith(f"no {address} in MLflow at sqlite:///")
    assert why in str(problem)


def test_altered_artefact_is_refused_until_it_is_itself_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, registry = updater(allow_unverified=True), Registry(folder)
    one.update(registry)
    with artefact(folder, 1) as path:
        path.write_bytes(shifted(0.25).graph(folded=False))
        move(folder, 1)
        one.update(registry)
    current = Current.read(Path("fetched"))
    assert served() == "2"
    assert "(version 1 in MLflow) is not served: its file was altered" in str(current.refused)
    one.update(registry)  # not so soon
    assert Current.read(Path("fetched")) == current
    monkeypatch.setattr(child, "RETRY_REFUSED_S", 0.0)
    one.update(registry)
    assert served() == "1"
    assert Current.read(Path("fetched")).refused is None


def test_alias_that_comes_back_from_a_refused_version(folder: Path) -> None:
    one, registry = updater(), Registry(folder)
    one.update(registry)
    with artefact(folder, 1) as path:
        path.unlink()
        move(folder, 1)
        one.update(registry)
    assert "it holds 0 ONNX files" in str(Current.read(Path("fetched")).refused)
    move(folder, 2)
    one.update(registry)
    assert Current.read(Path("fetched")).refused is None
    assert served() == "2"


def test_without_a_report_there_is_no_proof(folder: Path) -> None:
    client = store.client(folder)
    second = client.get_model_version("mnist-bn", "2")
    # as a path, for of a logged model MLflow knows the run
    where = client.get_model_version_download_uri("mnist-bn", "2")
    (experiment,) = {run.info.experiment_id for run in store.all_runs(folder)}
    empty = client.create_run(experiment).info.run_id
    for run_id, why in {
        None: "it belongs to no run",
        empty: f"its run {empty} has no parity.json",
        "f" * 32: f"its run {'f' * 32} cannot be had",
    }.items():
        made = client.create_model_version("mnist-bn", where, run_id=run_id, tags=second.tags)
        shutil.rmtree("fetched", ignore_errors=True)
        address = f"models:/mnist-bn/{made.version}"
        updater(address).update(Registry(folder))
        current = Current.read(Path("fetched"))
        assert current.fetched is None
        assert why in str(current.refused)
        assert "--allow-unverified" in str(current.refused)
        unverified = updater(address, allow_unverified=True)
        unverified.update(Registry(folder))
        assert why in str(unverified.source.load().unproven)


def test_report_about_other_files_is_no_proof(folder: Path) -> None:
    client = store.client(folder)
    first, second = (client.get_model_version("mnist-bn", n) for n in ("1", "2"))
    made = client.create_model_version(
        "mnist-bn", second.source, run_id=first.run_id, tags=second.tags
    )
    updater(f"models:/mnist-bn/{made.version}").update(Registry(folder))
    assert "its run's parity.json is about other files" in str(
        Current.read(Path("fetched")).refused
    )


def test_lost_model_is_refused(folder: Path) -> None:
    client = store.client(folder)
    second = client.get_model_version("mnist-bn", "2")
    lost = f"runs:/{'f' * 32}/model"
    made = client.create_model_version("mnist-bn", lost, run_id=second.run_id)
    updater(f"models:/mnist-bn/{made.version}").update(Registry(folder))
    assert "its model cannot be had: Run with id=" in str(Current.read(Path("fetched")).refused)


def test_troubles_are_logged_once_and_what_is_there_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, registry = updater(), Registry(folder)
    one.update(registry)
    client = store.client(folder)
    capsys.readouterr()
    client.delete_registered_model_alias("mnist-bn", "champion")
    for _ in range(3):
        one.poll(registry)
    Path("mlflow.db").rename("away.db")
    for _ in range(3):
        one.poll(registry)
    assert not Path("mlflow.db").exists()
    assert served() == "2"
    Path("away.db").rename("mlflow.db")
    move(folder, 2)
    for _ in range(3):
        one.poll(registry)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == [
        "registry absent",
        "registry away",
        "registry back",
    ]
    assert {event["source"] for event in events} == {CHAMPION}


def test_database_that_was_made_again_is_noticed(folder: Path) -> None:
    one, registry = updater(), Registry(folder)
    one.update(registry)
    shutil.copy("mlflow.db", "again.db")
    Path("again.db").replace("mlflow.db")
    with pytest.raises(StoreReplacedError):
        one.poll(registry)


@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_store_stops_the_start_and_not_the_server(
    server: Callable[[], contextlib.AbstractContextManager[str]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", "//mario:secret@"))
        registry, one = Registry(folder), updater()
        problem = child.fetch_all([one], registry)
        one.poll(registry)
        one.poll(registry)
    (event,) = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    for text in (str(problem), event["why"]):
        assert text.startswith(f"MLflow at {uri}: ")
        assert "secret" not in text
    assert event["event"] == "registry away"


# ------------------------------------------------------------------------------- the child process


def test_child_that_dies_is_started_again_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deaths() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    clock = [0.0]
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    one = RegisteredSource("digits", Address.parse(CHAMPION), tmp_path / "0")
    watcher = supervisor.RegistryWatcher([one], 10.0)
    with pytest.raises(UserError, match="ended with status 1 before it had fetched anything"):
        watcher.start()
    waits = []
    for _ in range(8):
        assert watcher._child
        watcher._child.wait()
        watcher.restart_if_dead()
        (death,) = deaths()
        assert (death["event"], death["status"]) == ("fetcher died", 1)
        waits.append(death["again_in"])
        before = watcher._child
        clock[0] += waits[-1] / 2
        watcher.restart_if_dead()
        assert watcher._child is before
        clock[0] += waits[-1] / 2
        watcher.restart_if_dead()
        assert watcher._child is not before
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    clock[0] += 100  # long after its start
    assert watcher._child
    watcher._child.wait()
    watcher.restart_if_dead()
    assert [death["again_in"] for death in deaths()] == [1]
    watcher.stop()


# --------------------------------------------------------------------------------- the whole of it


def test_server_follows_the_champion(folder: Path, mnist_bn: MnistBn) -> None:
    folded = "folded=models:/mnist-bn-folded@champion"
    with serving(folder, CHAMPION, folded, MNIST_BN_TOKEN=TOKEN) as server:
        assert [server.version(), server.version("folded")] == ["2", "2"]
        (process,) = server.command.processes(FETCHER)
        assert TOKEN.encode() not in Path(f"/proc/{process}/environ").read_bytes()

        assert mnist_bn("promote", "1", "--override", "to compare them").status == 0
        server.until(lambda: server.version() == server.version("folded") == "1")
        assert mnist_bn("rollback").status == 0
        server.until(lambda: server.version() == server.version("folded") == "2")

        with artefact(folder, 1) as path:
            path.write_bytes(shifted(0.25).graph(folded=False))
            move(folder, 1)
            server.until(lambda: server.events("refused"))
        (refused,) = server.events("refused")
        assert refused["still_serving"] == server.version() == "2"
        assert "its file was altered" in refused["why"]
        counted = 'mnist_bn_swaps_total{model="mnist-bn",outcome="refused"} 1.0'
        assert counted in server.get("/metrics").splitlines()

        store.client(folder).delete_registered_model_alias("mnist-bn", "champion")
        server.until(lambda: server.events("registry absent"))
        assert server.version() == "2"
        assert server.stop() == 0
        assert server.command.gone()
    modules = {name.partition(".")[0] for name in Path("imported.txt").read_text().splitlines()}
    assert {"mnist_batchnorm", "uvicorn", "onnxruntime"} <= modules
    assert not modules & {"mlflow", "torch", "sqlalchemy", "pandas"}


def run(folder: Path, *words: str, uri: str = "") -> tuple[int, str]:
    """Return exit status and errors of a server that cannot start."""
    env = commands.environment(MLFLOW_TRACKING_URI=uri)
    return commands.run(folder, "mnist-bn", "serve", *words, "--port", "0", env=env)


@pytest.mark.slow
def test_versions_of_one_name(folder: Path) -> None:
    sources = ("digits=models:/mnist-bn/2", "digits=models:/mnist-bn/1")
    with serving(folder, *sources, MNIST_BN_TOKEN=TOKEN) as server:
        assert json.loads(server.get("/v2/models/digits"))["versions"] == ["2", "1"]
        assert server.infer(an_image()[0], "digits")[0] == "2"
        assert server.infer(an_image()[0], "digits/versions/1")[0] == "1"


def test_start_without_a_store(tmp_path: Path) -> None:
    status, err = run(tmp_path, CHAMPION)
    database = tmp_path / "mlflow.db"
    assert err == f"error: nothing is registered yet: no {database}; run `dvc repro` first\n"
    assert status == 2
    assert not database.exists()


@pytest.mark.slow
def test_start_that_fails(folder: Path) -> None:
    assert run(folder, "models:/mnist-bn@nobody")[0] == 2
    with store.refusing() as uri:
        status, err = run(folder, CHAMPION, uri=uri.replace("//", "//mario:secret@"))
    assert (status, err) == (2, f"error: MLflow at {uri}: [Errno 111] Connection refused\n")
    with artefact(folder, 2) as path:
        path.write_bytes(GOOD.graph(folded=False))
        status, err = run(folder, CHAMPION, "--allow-unverified")
    assert status == 1
    assert err.startswith(f"FAILED: {CHAMPION} (version 2 in MLflow) is not served: its file was")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_fetcher_ends_with_a_server_that_is_killed(folder: Path, workers: str) -> None:
    with serving(folder, CHAMPION, "--workers", workers) as server:
        (process,) = server.command.processes(FETCHER)
        commands.kill(server.command.process.pid)
        server.command.wait()
        deadline = time.monotonic() + commands.PATIENCE
        while server.command.processes(FETCHER):
            assert time.monotonic() < deadline, process
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_fetcher_that_dies_is_started_again(folder: Path, workers: str) -> None:
    with serving(folder, CHAMPION, "--workers", workers) as server:
        commands.kill(*server.command.processes(FETCHER))
        server.until(lambda: server.events("fetcher died"))
        assert server.version() == "2"
        move(folder, 1)
        server.until(lambda: server.version() == "1")
        assert len(server.command.processes(FETCHER)) == 1
        # one of the workers may have been slower
        server.until(lambda: len(server.events("retired")) == int(workers))
        with artefact(folder, 2) as path:
            path.unlink()
            move(folder, 2)
            server.until(lambda: len(server.events("refused")) == int(workers))
        if workers == "2":  # a new worker has the last version that was fit
            pids = {event["pid"] for event in server.events("serving")}
            commands.kill(pids.pop())
            server.until(lambda: len(server.events("serving")) == 3)
        assert server.version() == "1"
        assert server.stop() == 0
        assert server.command.gone()


@pytest.mark.slow
def test_database_that_is_made_again_is_followed(folder: Path) -> None:
    with serving(folder, CHAMPION) as server:
        shutil.copy("mlflow.db", "again.db")
        Path("again.db").replace("mlflow.db")
        server.until(lambda: server.events("registry replaced"))
        move(folder.rename(folder.with_name("elsewhere")), 1)  # no open connection to the old one
        folder.with_name("elsewhere").rename(folder)
        server.until(lambda: server.version() == "1")


@pytest.mark.slow
def test_server_of_a_team_comes_and_goes(
    project: Path,
    prepared: Path,
    params: Params,
    shared_server: services.Shared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.use_settings(monkeypatch)
    shared_server.empty()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds: the machine may be busy
    registered.prepare(project, prepared, params)
    registered.register(project, NETWORKS)
    with (
        services.Faulty(shared_server.uri) as faulty,
        serving(
            project.parent,  # wherever it is started
            CHAMPION,
            MLFLOW_TRACKING_URI=faulty.uri.replace("//", "//mario:secret@"),
            MLFLOW_HTTP_REQUEST_TIMEOUT="2",
        ) as server,
    ):
        modes: tuple[services.Mode, ...] = ("refuse", "500", "hang")
        for times, mode in enumerate(modes, start=1):
            faulty.switch(mode)
            server.until(lambda: len(server.events("registry away")) == times)  # noqa: B023
            number = 1 + (times + 1) % 2
            asked = len(faulty.requests)
            move(project, number)
            server.until(lambda: len(faulty.requests) > asked + 2)  # noqa: B023
            assert server.version() != str(number)
            faulty.switch("pass")
            server.until(lambda: server.version() == str(number))  # noqa: B023
            server.until(lambda: len(server.events("registry back")) == times)  # noqa: B023
        asked = len(faulty.requests)
        server.until(lambda: len(faulty.requests) > asked + 5)
        polls = set(faulty.requests[asked:])
        assert {poll.partition("?")[0] for poll in polls} == {
            "GET /api/2.0/mlflow/registered-models/alias"
        }
        assert "secret" not in server.command.err
        assert server.stop() == 0
