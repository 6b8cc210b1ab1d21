"""Whether there is nothing to sync is told rightly, and without MLflow."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from mnist_batchnorm.core.params import Params
from mnist_batchnorm.mlflow_sync import up_to_date
from mnist_batchnorm.mlflow_sync.up_to_date import (
    SyncedState,
    load_note,
    save_note,
    source_state,
    still_shown,
    synced_files,
)
from tests.conftest import MnistBn
from tests.support import recorded, services, store

SYNC_ENTRY = """\
  sync:
    cmd: mnist-bn sync
    deps:
    - path: models/bn.onnx
      hash: md5
      md5: d41d8cd98f00b204e9800998ecf8427e
    outs:
    - path: reports/synced.json
      hash: md5
      md5: d41d8cd98f00b204e9800998ecf8427e
"""


@pytest.fixture(scope="module")
def known(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results git and MLflow have, with a registered model."""
    folder = tmp_path_factory.mktemp("known") / "project"
    recorded.record(folder, prepared, params)
    recorded.sync(folder)
    return folder


@pytest.fixture
def folder(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as working folder."""
    store.use_settings(monkeypatch)
    copy = shutil.copytree(known, tmp_path / "project")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def held(known: Path, folder: Path) -> SyncedState:
    """What its store holds, and an alias by hand."""
    found = load_note(known, everything=False)
    assert found is not None
    client, (model, *_) = store.client(folder), found.models
    client.create_registered_model("mnist-bn")
    client.create_model_version("mnist-bn", f"models:/{model}", model_id=model)
    client.set_registered_model_alias("mnist-bn", "candidate", "1")
    return replace(
        found,
        aliases={"mnist-bn": {"candidate": "1"}, "mnist-bn-folded": {}},
        folders=[path.replace(str(known), str(folder)) for path in found.folders],
    )


# --- the state of the files ---------------------------------------------------------------------


def state(folder: Path, everything: bool = False) -> str:
    return source_state(folder, everything, synced_files())


CHANGES: dict[str, Callable[[Path], object]] = {
    "a report": lambda folder: (folder / "reports/index.html").write_text("another page"),
    "a new report": lambda folder: (folder / "reports/plots/new.svg").write_text("<svg/>"),
    "a lost report": lambda folder: (folder / "reports/plots/seeds.svg").unlink(),
    "a model": lambda folder: (folder / "models/plain.safetensors").write_bytes(b"others"),
    "the ledger": lambda folder: (folder / "models/registry.json").write_text("{}"),
    "params.yaml": lambda folder: store.edit(folder / "params.yaml", "lr: 0.01", "lr: 0.02"),
    "dvc.lock": lambda folder: store.edit(folder / "dvc.lock", "lr: 0.01", "lr: 0.02"),
    "no dvc.lock": lambda folder: (folder / "dvc.lock").unlink(),
    "a commit": lambda folder: recorded.git(folder, "commit", "-qm", "more", "--allow-empty"),
    "a tag": lambda folder: recorded.git(folder, "tag", "kept"),
    "an experiment": lambda folder: recorded.git(
        folder, "update-ref", f"refs/exps/00/{'0' * 38}/slower", "HEAD"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_changes_with_all_that_mlflow_is_told_of(folder: Path, change: str) -> None:
    before = state(folder)
    CHANGES[change](folder)
    assert state(folder) != before


def test_state_is_that_of_what_was_asked_and_of_an_experiment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {state(folder, everything) for everything in (False, True)}
    monkeypatch.setenv("DVC_EXP_NAME", "slower")
    assert len({*states, state(folder)}) == 3


def test_state_does_not_change_with_what_sync_and_dvc_write_themselves(folder: Path) -> None:
    before = state(folder)
    (folder / "reports/synced.json").write_text("{}")
    (folder / "models/.registry.lock").touch()
    (folder / "reports/.page.html.1234.tmp").touch()
    (folder / "mlflow.db.synced").touch()
    lock = folder / "dvc.lock"
    lock.write_text(lock.read_text() + SYNC_ENTRY)
    assert state(folder) == before
    store.edit(lock, "    cmd: mnist-bn sync\n", "    cmd: mnist-bn sync --all\n")
    assert state(folder) == before
    lock.write_text(lock.read_text() + "  zeta:\n    cmd: another stage after it\n")
    assert state(folder) != before


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\0", b"  sync:\n", b"<<<<<<< HEAD\n"])
def test_any_dvc_lock_has_a_state(folder: Path, text: bytes) -> None:
    (folder / "dvc.lock").write_bytes(text)
    assert len(state(folder)) == 64


# --- the note -----------------------------------------------------------------------------------

HELD = SyncedState(
    "state", ["run"], ["seed"], ["model"], {"mnist-bn": {"champion": "1"}}, ["folder"], ["path"]
)


def test_note_is_of_a_store_and_of_what_was_asked(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.use_settings(monkeypatch)
    assert load_note(project, everything=False) is None
    save_note(project, False, HELD)
    save_note(project, True, replace(HELD, state="all"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert load_note(project, everything=False) is None
    save_note(project, False, replace(HELD, state="server"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert load_note(project, everything=False) == HELD
    assert load_note(project, everything=True) == replace(HELD, state="all")


@pytest.mark.parametrize("text", ["", "garbage", "[]", "{}", '{"ENTRY": 1}', '{"ENTRY": {}}'])
def test_note_that_is_none_is_written_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    store.use_settings(monkeypatch)
    save_note(project, False, HELD)
    note = project / "mlflow.db.synced"
    (entry,) = json.loads(note.read_text())
    note.write_text(text.replace("ENTRY", entry))
    assert load_note(project, everything=False) is None
    save_note(project, False, HELD)
    assert load_note(project, everything=False) == HELD


def test_note_does_not_tell_a_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.use_settings(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@server:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    save_note(project, False, HELD)
    text = (project / "mlflow.db.synced").read_text()
    assert not [word for word in ("anna", "secret", "server", "hush") if word in text]
    assert load_note(project, everything=False) == HELD


# --- the store ----------------------------------------------------------------------------------


def test_store_that_shows_all_of_it(folder: Path, held: SyncedState) -> None:
    assert len(held.runs) == 3
    assert len(held.seeds) == 4
    assert len(held.models) == 3
    assert len(held.folders) == 6
    assert still_shown(folder, held)


def lose(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / "mlartifacts" / name)


def put_alias(folder: Path, name: str, alias: str) -> None:
    client = store.client(folder)
    if name != "mnist-bn":
        client.create_registered_model(name)
        (version, *_) = client.search_model_versions()
        model = version.source.removeprefix("models:/")
        client.create_model_version(name, version.source, model_id=model)
    client.set_registered_model_alias(name, alias, "1")


LOSSES: dict[str, Callable[[Path, SyncedState], object]] = {
    "a run": lambda folder, held: store.client(folder).delete_run(held.runs[0]),
    "a run of a seed": lambda folder, held: store.client(folder).delete_run(held.seeds[0]),
    "its end": lambda folder, held: store.client(folder).update_run(held.runs[1], "RUNNING"),
    "a model": lambda folder, held: store.client(folder).delete_logged_model(held.models[0]),
    "an alias": lambda folder, _: store.client(folder).delete_registered_model_alias(
        "mnist-bn", "candidate"
    ),
    "the models' registry": lambda folder, _: store.client(folder).delete_registered_model(
        "mnist-bn"
    ),
}
CHANGED_ALIASES: dict[str, Callable[[Path, SyncedState], object]] = {
    "one more alias": lambda folder, _: put_alias(folder, "mnist-bn", "champion"),
    "an alias of nothing registered": lambda folder, _: put_alias(
        folder, "mnist-bn-folded", "candidate"
    ),
}
LOST_FILES: dict[str, Callable[[Path, SyncedState], object]] = {
    "the database": lambda folder, _: (folder / "mlflow.db").unlink(),
    "garbage for a database": lambda folder, _: (folder / "mlflow.db").write_bytes(b"garbage"),
    "an empty database": lambda folder, _: (folder / "mlflow.db").write_bytes(b""),
    "another database": lambda folder, _: (folder / "mlflow.db").write_bytes(
        store.empty_database()
    ),
    "a run's artefacts": lambda folder, held: lose(folder, held.runs[0]),
    "a model's files": lambda folder, held: lose(folder, f"models/{held.models[0]}"),
}


@pytest.mark.parametrize("loss", LOSSES | CHANGED_ALIASES | LOST_FILES)
def test_database_that_lost_some_of_it(folder: Path, held: SyncedState, loss: str) -> None:
    (LOSSES | CHANGED_ALIASES | LOST_FILES)[loss](folder, held)
    assert not still_shown(folder, held)


def test_what_was_left_out_and_can_be_had_now(folder: Path, held: SyncedState) -> None:
    lacking = folder / "lacking"
    held = replace(held, lacking=[str(lacking)])
    assert still_shown(folder, held)
    lacking.touch()
    assert not still_shown(folder, held)


def test_store_of_another_kind_is_not_seen(
    folder: Path, held: SyncedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://server/database")
    assert not still_shown(folder, held)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Server]:
    folder = tmp_path_factory.mktemp("server")
    database, artefacts = f"sqlite:///{folder}/server.db", str(folder / "artefacts")
    with services.mlflow_server(database, artefacts, folder=folder) as server:
        yield server


@pytest.fixture
def on_server(
    folder: Path,
    server: services.Server,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> SyncedState:
    """A run with one in it, a model and an alias on a server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds: the machine may be busy
    monkeypatch.setattr(up_to_date, "SERVER_TIMEOUT_S", 20)
    client = store.client(folder)
    for name in ("mnist-bn", "mnist-bn-folded"):
        if client.search_registered_models(f"name = '{name}'"):
            client.delete_registered_model(name)
    experiment = client.create_experiment(request.node.name)
    runs = [client.create_run(experiment).info.run_id for _ in range(3)]
    for run in runs:
        client.set_terminated(run)
    model = client.create_logged_model(experiment, "bn").model_id
    client.create_registered_model("mnist-bn")
    client.create_model_version("mnist-bn", f"models:/{model}", model_id=model)
    client.set_registered_model_alias("mnist-bn", "candidate", "1")
    aliases = {"mnist-bn": {"candidate": "1"}, "mnist-bn-folded": {}}
    return SyncedState("state", runs[:2], runs[2:], [model], aliases, [], [])


def test_server_that_shows_all_of_it(folder: Path, on_server: SyncedState) -> None:
    assert still_shown(folder, on_server)


@pytest.mark.parametrize("loss", LOSSES | CHANGED_ALIASES)
def test_server_that_lost_some_of_it(folder: Path, on_server: SyncedState, loss: str) -> None:
    (LOSSES | CHANGED_ALIASES)[loss](folder, on_server)
    assert not still_shown(folder, on_server)


@pytest.mark.parametrize("bad", store.BAD_SERVERS)
def test_bad_server_is_not_waited_for(
    folder: Path,
    held: SyncedState,
    monkeypatch: pytest.MonkeyPatch,
    bad: Callable[[], AbstractContextManager[str]],
) -> None:
    monkeypatch.setattr(up_to_date, "SERVER_TIMEOUT_S", 0.2)
    with bad() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert not still_shown(folder, held)


# --- the whole ----------------------------------------------------------------------------------


def test_trainings_alone_are_all_of_it_too(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///new.db")
    (folder / "new.db").write_bytes(store.empty_database())
    (folder / "reports/parity.json").unlink()
    assert mnist_bn("sync").status == 0
    assert mnist_bn("sync").out == "MLflow has all of it\n"


def test_aliases_of_an_emptied_ledger_are_taken_away(
    folder: Path, held: SyncedState, mnist_bn: MnistBn
) -> None:
    assert still_shown(folder, held)
    assert "mnist-bn: nothing registered" in mnist_bn("sync").out
    assert store.aliases(folder) == {"mnist-bn": {}}
    assert mnist_bn("sync").out == "MLflow has all of it\n"
