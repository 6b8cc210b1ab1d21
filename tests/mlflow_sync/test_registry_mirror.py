"""MLflow's model registry shows what models/registry.json says, and the champion serves."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mnist_batchnorm.artifacts.goldens import GOLDEN_FILES, GOLDEN_IMAGES, read_pinned_outputs
from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.arrays import relative_change
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED, REGISTRY
from mnist_batchnorm.mlflow_sync.uri import tracking_uri
from mnist_batchnorm.promotion.goldens import TOLERANCE
from tests.conftest import ROOT, MnistBn
from tests.support import recorded, services, store
from tests.support.candidates import ALIKE, GOOD, WORSE, shifted
from tests.support.registered import prepare, register


@pytest.fixture(scope="module")
def registered(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder under DVC with three versions: 1 was champion, 2 was refused, 3 is champion."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copy(ROOT / "params.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        store.use_settings(patch)
        prepare(folder, prepared, params)
        versions = {"1": GOOD, "2": shifted(WORSE), "3": shifted(ALIKE)}
        register(folder, versions, ["register"])
    recorded.sync(folder)
    return folder


@pytest.fixture
def folder(project: Path, registered: Path, backend: str, mnist_bn: MnistBn) -> Path:
    """A copy of it as working folder, and a store that shows it."""
    store.copy_project(registered, project)
    if backend == "server":
        done = mnist_bn("sync")
        assert (done.status, done.err) == (0, "")
    return project


def test_versions_and_aliases_are_those_of_the_ledger(folder: Path) -> None:
    expected = {"champion": 3, "candidate": 3}
    assert store.aliases(folder) == {"mnist-bn": expected, "mnist-bn-folded": expected}
    client = store.client(folder)
    for name, file in REGISTERED.items():
        found = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
        assert found.keys() == {1, 2, 3}
        assert found[3].tags["sha256"] == digest(MODELS / file)
        assert [found[n].tags["decision"] for n in (1, 2, 3)] == ["promoted", "refused", "promoted"]
        assert found[2].tags["rule.champion"].startswith("refused: worse than version 1")
        assert "p = " in found[3].tags["rule.champion"]
        assert "**refused** worse than version 1" in found[2].description
    run = client.get_run(found[3].run_id)
    assert run.data.tags["mnist_bn.weights_sha256"] == digest(CHECKPOINT)


def test_champion_loads_and_gives_the_goldens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import onnxruntime

    monkeypatch.chdir(folder.parent)  # wherever it is loaded
    images = load_split(folder / GOLDEN_IMAGES)
    sha256 = digest(folder / GOLDEN_IMAGES)
    goldens = read_pinned_outputs(folder / GOLDEN_FILES["bn"], images, sha256).logits
    inputs = network_input(images.images)
    mlflow.set_tracking_uri(tracking_uri(folder))
    for name, file in REGISTERED.items():
        uri = f"models:/{name}@champion"
        predicted = mlflow.pyfunc.load_model(uri).predict({"image": inputs})["logits"]
        assert relative_change(goldens, predicted).max() <= TOLERANCE
        proto = mlflow.onnx.load_model(uri)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        assert np.array_equal(session.run(["logits"], {"image": inputs})[0], predicted)
        (logged,) = Path(mlflow.artifacts.download_artifacts(uri)).glob("*.onnx")
        assert logged.read_bytes() == (folder / MODELS / file).read_bytes()


def test_rollback_and_override_move_the_alias(folder: Path, mnist_bn: MnistBn) -> None:
    assert mnist_bn("rollback", "--reason", "sevens look like ones").status == 0
    assert {name: of["champion"] for name, of in store.aliases(folder).items()} == {
        "mnist-bn": 1,
        "mnist-bn-folded": 1,
    }
    assert mnist_bn("promote", "2", "--override", "to compare them live").status == 0
    assert {of["champion"] for of in store.aliases(folder).values()} == {2}
    version = store.client(folder).get_model_version("mnist-bn", "2")
    assert "to compare them live" in version.description
    assert version.tags["decision"] == "refused"  # by the rules
    rolled_back = store.client(folder).get_model_version("mnist-bn", "3").description
    assert "rolled back to version 1 by" in rolled_back
    assert "sevens look like ones" in rolled_back


def test_alias_that_somebody_moved_by_hand_is_put_back(folder: Path, mnist_bn: MnistBn) -> None:
    store.client(folder).set_registered_model_alias("mnist-bn", "champion", "2")
    assert "champion is version 3" in mnist_bn("sync").out
    assert store.aliases(folder)["mnist-bn"]["champion"] == 3
    assert mnist_bn("sync").out == "MLflow has all of it\n"


def test_lost_store_is_made_again(
    folder: Path,
    tmp_path: Path,
    mnist_bn: MnistBn,
    backend: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = store.shown(folder)
    # elsewhere, because this process keeps the database open that it has used
    lost = shutil.ignore_patterns("mlflow.db*", "mlartifacts", "tmp")
    again = shutil.copytree(folder, tmp_path / "again", ignore=lost)
    monkeypatch.chdir(again)
    if backend == "server":
        shared: services.Shared = request.getfixturevalue("shared_server")
        shared.empty()
    done = mnist_bn("sync")
    assert (done.status, done.err) == (0, "")
    assert store.shown(again) == before


def test_version_that_cannot_be_loaded_is_replaced(folder: Path, mnist_bn: MnistBn) -> None:
    import mlflow

    client = store.client(folder)
    (version,) = client.search_model_versions("name = 'mnist-bn' AND tags.`mnist_bn.version` = '3'")
    client.delete_logged_model(version.source.removeprefix("models:/"))
    assert mnist_bn("sync").err == ""
    mlflow.set_tracking_uri(tracking_uri(folder))
    assert mlflow.pyfunc.load_model("models:/mnist-bn@champion")
    assert mnist_bn("sync").out == "MLflow has all of it\n"


def test_older_ledger_does_not_move_the_champion(folder: Path, mnist_bn: MnistBn) -> None:
    ledger = (folder / REGISTRY).read_bytes()
    assert mnist_bn("rollback").status == 0
    (folder / REGISTRY).write_bytes(ledger)  # an old checkout, or a clone that lags behind
    done = mnist_bn("sync")
    assert done.status == 0
    assert "mnist-bn: MLflow shows the champion of another history" in done.err
    assert {of["champion"] for of in store.aliases(folder).values()} == {1}
    assert mnist_bn("promote", "2", "--override", "a person decides").status == 0
    assert {of["champion"] for of in store.aliases(folder).values()} == {2}


def test_bytes_that_are_not_the_ledgers_are_not_shown(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Ledger.load(REGISTRY).versions[0]
    md5 = version.files["mnist-bn"].md5
    cached = folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.write_bytes((MODELS / "bn-folded.onnx").read_bytes())
    (folder / "mlflow.db").rename(folder / "another.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///fresh.db")
    done = mnist_bn("sync")
    assert "version 1 of mnist-bn is not shown: its file is neither" in done.err
    found = store.client(folder).search_model_versions("name = 'mnist-bn'")
    assert {one.tags["mnist_bn.version"] for one in found} == {"2", "3"}


def test_deleted_experiment_is_restored(folder: Path, mnist_bn: MnistBn) -> None:
    client = store.client(folder)
    client.delete_experiment(store.all_runs(folder)[0].info.experiment_id)
    assert mnist_bn("sync").err == ""
    assert len(store.all_runs(folder)) > 2


def test_version_whose_file_is_lost_is_named(folder: Path, mnist_bn: MnistBn) -> None:
    shutil.rmtree(".dvc/cache/files")
    client = store.client(folder)
    for version in ("1", "3"):
        client.delete_model_version("mnist-bn", version)
    done = mnist_bn("sync")
    assert done.status == 0
    assert "version 1 of mnist-bn, mnist-bn-folded is not shown: its file is neither" in done.err
    assert store.aliases(folder)["mnist-bn"]["champion"] == 4  # MLflow's next number
