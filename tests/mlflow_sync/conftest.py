from pathlib import Path

import pytest

from mnist_batchnorm.core.params import Params
from tests.support import store
from tests.support.finished import finish, write_pages


@pytest.fixture(scope="session")
def results(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage before sync has run, with an empty store."""
    folder = tmp_path_factory.mktemp("finished")
    finish(folder, prepared, params)
    write_pages(folder)
    store.make_trainable(folder)
    (folder / "mlflow.db").write_bytes(store.empty_database())
    return folder
