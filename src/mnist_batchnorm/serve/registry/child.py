"""The process of a server that talks to MLflow, so that the server itself never imports it.

``python -m mnist_batchnorm.serve.registry.child`` reads one request from standard input, fetches
the versions it names, answers on standard output whether that worked, and polls the registry until
its standard input closes, which happens however the server ends.
"""

import contextlib
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_batchnorm.core.child import MessageReader, messages_to_parent
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.artifacts import SHA256_TAG
from mnist_batchnorm.mlflow_sync.connection import describe_error, import_mlflow
from mnist_batchnorm.mlflow_sync.registry_mirror import VERSION_TAG
from mnist_batchnorm.mlflow_sync.uri import database_path, tracking_uri, without_password
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.registry.source import (
    REPORT,
    Address,
    Current,
    Fetched,
    RegisteredSource,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

RETRY_REFUSED_S = 60.0  # its run may have a report by then
STORE_REPLACED = 75  # exit status, EX_TEMPFAIL
# MLflow's error codes for missing entities; an unknown alias is an invalid value
NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class AbsentError(Exception):
    """MLflow has no such model, alias, version or run."""


class StoreReplacedError(Exception):
    """The database's path leads to another file than the one this process has open."""


@contextlib.contextmanager
def translating_not_found() -> Iterator[None]:
    """Translate MLflow's "not found" errors into an `AbsentError`."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "error_code", None)
        if code not in NOT_FOUND_CODES:
            raise
        text = str(error).removeprefix(f"{code}: ")
        raise AbsentError(text.splitlines()[0].rstrip(".")) from None


class Registry:
    """MLflow's model registry, read only; connects at the first request."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = tracking_uri(root)
        self._client: MlflowClient | None = None
        self._file: tuple[int, int] | None = None

    @translating_not_found()
    def find(self, address: Address) -> "ModelVersion":
        """Return the version that an address means, in one request."""
        client = self._connected()
        if address.alias:
            return client.get_model_version_by_alias(address.model, address.alias)
        return client.get_model_version(address.model, address.number)

    def _connected(self) -> "MlflowClient":
        file = self._database_id()
        if not self._client:
            import_mlflow()
            import mlflow
            from mlflow.tracking import MlflowClient

            mlflow.set_tracking_uri(self.uri)  # for functions without a client: those of artifacts
            registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or self.uri
            self._client = MlflowClient(self.uri, registry_uri)
            self._file = file
        elif file != self._file:
            raise StoreReplacedError
        return self._client

    def _database_id(self) -> tuple[int, int] | None:
        local = database_path(self.root)
        if not local:
            return None
        try:
            found = local.stat()
        except FileNotFoundError:  # MLflow would create one
            problem = f"nothing is registered yet: no {local}; run `dvc repro` first"
            raise UserError(problem) from None
        return found.st_dev, found.st_ino

    def fetch(self, version: "ModelVersion", source: RegisteredSource) -> Fetched:
        """Download a version's ONNX file and its run's parity report into the source's folder."""
        number = str(version.version)
        content = self._onnx(version)
        digest, registered = sha256(content).hexdigest(), version.tags.get(SHA256_TAG, "")
        if registered not in ("", digest):
            raise CheckFailedError(
                f"its file was altered: SHA-256 {digest}, but it was registered as {registered}"
            )
        report, unreported = self._report(version.run_id)
        onnx = source.onnx(number)
        shutil.rmtree(onnx.parent, ignore_errors=True)  # of an earlier fetch
        write_bytes(onnx, content)
        if report is not None:
            write_bytes(source.parity(number), report)
        ledger_version = version.tags.get(VERSION_TAG, "")
        seen_version = ledger_version if ledger_version.isdecimal() else number
        return Fetched(number, seen_version, digest, unreported)

    def _onnx(self, version: "ModelVersion") -> bytes:
        if version.status != "READY":
            raise CheckFailedError(f"MLflow says that it is {version.status}")
        uri = f"models:/{version.name}/{version.version}"
        try:
            files = [path for path in self._list(artifact_uri=uri) if path.endswith(".onnx")]
            if len(files) != 1:
                raise CheckFailedError(f"it holds {len(files)} ONNX files, expected 1")
            return self._download(artifact_uri=f"{uri}/{files[0]}")
        except AbsentError as error:
            raise CheckFailedError(f"its model cannot be had: {error}") from None

    def _report(self, run_id: str | None) -> tuple[bytes | None, str | None]:
        if not run_id:
            return None, "it belongs to no run, so there is no report of the gate"
        try:
            if REPORT in self._list(run_id=run_id):
                return self._download(run_id=run_id, artifact_path=REPORT), None
        except AbsentError as error:
            return None, f"its run {run_id} cannot be had: {error}"
        return None, f"its run {run_id} has no {REPORT}, the gate's report"

    @translating_not_found()
    def _list(self, **location: str) -> list[str]:
        from mlflow.artifacts import list_artifacts

        return [found.path for found in list_artifacts(tracking_uri=self.uri, **location)]

    @translating_not_found()
    def _download(self, **location: str) -> bytes:
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as folder:
            path = download_artifacts(dst_path=folder, tracking_uri=self.uri, **location)
            return Path(path).read_bytes()


@dataclass
class SourceUpdater:
    """Keeps a source's folder at the version that its address means."""

    source: RegisteredSource
    _refused: tuple[str, float] = ("", 0.0)  # the version refused last, and when
    _logged_state: str = "back"

    @property
    def address(self) -> Address:
        return self.source.address

    def update(self, registry: Registry) -> None:
        """Fetch the version that the address means, unless it has been."""
        version, folder = registry.find(self.address), self.source.folder
        current, number = Current.read(folder), str(version.version)
        if current.fetched and current.fetched.number == number:
            if current.refused:  # the alias has moved back to the version that is served
                Current(current.fetched).write(folder)
            return
        refused, at = self._refused
        if refused == number and time.monotonic() - at < RETRY_REFUSED_S:
            return
        try:
            fetched = registry.fetch(version, self.source)
            self.source.load_version(fetched)
        except (CheckFailedError, UserError) as error:
            self._refused = number, time.monotonic()
            why = str(error)
            if not why.startswith(str(self.address)):
                why = f"{self.address} (version {number} in MLflow) is not served: {why}"
            if current.refused != why:
                Current(current.fetched, why).write(folder)
            return
        Current(fetched).write(folder)
        log("fetched", source=str(self.address), number=number, sha256=fetched.sha256)
        kept = {each.number for each in (fetched, current.fetched) if each}
        for old in folder.iterdir():
            if old.is_dir() and old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def try_update(self, registry: Registry) -> tuple[str, str]:
        """Call `update`; return the registry's state, back, absent or away, and the reason."""
        try:
            self.update(registry)
        except StoreReplacedError:
            raise
        except AbsentError as error:
            return "absent", str(error)
        except UserError as error:
            return "away", str(error)
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            return "away", describe_error(error, registry.root)
        return "back", ""

    def poll(self, registry: Registry) -> None:
        """Call `try_update`; log once when it fails and once when it works again."""
        state, why = self.try_update(registry)
        if state == self._logged_state:
            return
        self._logged_state, source = state, str(self.address)
        if state == "back":
            log("registry back", source=source)
        else:
            log(f"registry {state}", "warning", source=source, why=without_password(why))


def fetch_all(updaters: Sequence[SourceUpdater], registry: Registry) -> str | None:
    """Fetch the version that each source's address means; return what went wrong, if anything."""
    for updater in updaters:
        state, why = updater.try_update(registry)
        if state == "absent":
            return f"no {updater.address} in MLflow at {without_password(registry.uri)}: {why}"
        if state == "away":
            return why
    return None


def main() -> int:
    """Serve the request on standard input until the server closes it; return the exit status."""
    messages = iter(MessageReader(0))
    received = next(messages, None)
    if not received:  # the server has ended already
        return 0
    (request,) = received
    threading.Thread(target=exit_with_server, args=[messages], daemon=True).start()
    logging.disable()  # the exceptions contain what libraries would log
    registry = Registry(repository())
    updaters = [
        SourceUpdater(RegisteredSource(name, Address.parse(address), Path(folder), unverified))
        for name, address, folder, unverified in request["sources"]
    ]
    if request["starting"]:
        with messages_to_parent() as send:
            problem = fetch_all(updaters, registry)
            send(problem)
        if problem or not request["period"]:
            return 0
    gc.enable()
    gc.freeze()
    # a version number always means the same version
    by_alias = [updater for updater in updaters if updater.address.alias]
    try:
        while True:
            for updater in by_alias:
                updater.poll(registry)
            time.sleep(request["period"])
    except StoreReplacedError:
        log("registry replaced", "warning", uri=without_password(registry.uri))
        return STORE_REPLACED


def exit_with_server(messages: Iterator[object]) -> None:
    """End this process as soon as the server closes its end of standard input."""
    for _ in messages:
        pass
    os._exit(0)


if __name__ == "__main__":
    gc.disable()  # a fifth of the time that MLflow takes to import; see cli.py
    try:
        status = main()
    except Exception as error:  # noqa: BLE001 - a traceback would not be a line of the log
        log("failed", "error", doing="follow MLflow's registry", why=without_password(repr(error)))
        status = 1
    sys.stderr.flush()
    os._exit(status)  # nothing is left to do, and MLflow takes a while to shut down
