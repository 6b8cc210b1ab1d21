"""The child process of a server that serves from MLflow's registry: it alone talks to MLflow.

``python -m mnist_batchnorm.serve.registry.child`` reads its `Order` as a line of JSON from standard input,
fetches what that names, says on standard output how that went, and follows the registry until its
standard input closes, as it does however the server ends.
"""

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.artifacts import SHA256_TAG
from mnist_batchnorm.mlflow_sync.registry_mirror import VERSION_TAG
from mnist_batchnorm.mlflow_sync.run_store import import_mlflow, trouble
from mnist_batchnorm.mlflow_sync.uri import database, tracking_uri, without_password
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.registry.source import REPORT, Address, Current, Fetched

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

RETRY = 60.0  # seconds after which a refused version is fetched again: its run may be reported now
STORE_REPLACED = 75  # exit status, EX_TEMPFAIL
# error codes of MLflow for what is not there; an unknown alias is an invalid value
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class AbsentError(Exception):
    """MLflow answers, and says that there is no such thing."""


class StoreReplacedError(Exception):
    """The database's file is another than the one that this process has open."""


class Registry:
    """MLflow's registry, read only; connects when it is first asked.

    Attributes:
        root: the folder of the default store.
        uri: where MLflow stores.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = tracking_uri(root)
        self._client: MlflowClient | None = None
        self._file: tuple[int, int] | None = None

    def find(self, address: Address) -> "ModelVersion":
        """Look a version up: one request.

        Raises:
            AbsentError: There is no such model, alias or version.
            UserError: There is no database.
            StoreReplacedError: There is another one.
            Exception: whatever MLflow raises for a store that is not usable.
        """
        client = self._connected()
        from mlflow.exceptions import MlflowException

        try:
            if address.alias:
                return client.get_model_version_by_alias(address.model, address.alias)
            return client.get_model_version(address.model, address.number)
        except MlflowException as error:
            raise _absent(error) from None

    def _connected(self) -> "MlflowClient":
        file = self._identity()
        if not self._client:
            self._client = self._connect()
            self._file = file
        elif file != self._file:
            raise StoreReplacedError
        return self._client

    def _identity(self) -> tuple[int, int] | None:
        local = database(self.root)
        if not local:
            return None
        try:
            found = local.stat()
        except FileNotFoundError:  # MLflow would create one
            problem = f"nothing is registered yet: no {local}; run `dvc repro` first"
            raise UserError(problem) from None
        return found.st_dev, found.st_ino

    def _connect(self) -> "MlflowClient":
        import_mlflow()
        import mlflow
        from mlflow.tracking import MlflowClient

        mlflow.set_tracking_uri(self.uri)  # for what looks at no client: the artefacts
        return MlflowClient(self.uri, os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)

    def fetch(self, version: "ModelVersion", folder: Path) -> Fetched:
        """Fetch a version's ONNX file and its run's report into a folder of their own.

        Raises:
            CheckFailedError: The version holds no ONNX file, or other bytes than it says.
            Exception: whatever MLflow raises for a store that is not usable.
        """
        number = str(version.version)
        content = self._onnx(version)
        digest, said = sha256(content).hexdigest(), version.tags.get(SHA256_TAG, "")
        if said not in ("", digest):
            raise CheckFailedError(
                f"its file was altered: SHA-256 {digest}, but it was registered as {said}"
            )
        known = version.tags.get(VERSION_TAG, "")
        place = folder / number
        report, unreported = self._report(version.run_id)
        fetched = Fetched(
            number=number,
            version=known if known.isdecimal() else number,
            sha256=digest,
            onnx=place / "model.onnx",
            parity=place / REPORT,
            unreported=unreported,
        )
        shutil.rmtree(place, ignore_errors=True)  # from when it was fetched before
        write_bytes(fetched.onnx, content)
        if report is not None:
            write_bytes(fetched.parity, report)
        return fetched

    def _onnx(self, version: "ModelVersion") -> bytes:
        from mlflow.exceptions import MlflowException

        if version.status != "READY":
            raise CheckFailedError(f"MLflow says that it is {version.status}")
        uri = f"models:/{version.name}/{version.version}"
        try:
            files = [path for path in self._list(artifact_uri=uri) if path.endswith(".onnx")]
            if len(files) != 1:
                raise CheckFailedError(f"it holds {len(files)} ONNX files, expected 1")
            return self._download(artifact_uri=f"{uri}/{files[0]}")
        except MlflowException as error:
            raise CheckFailedError(f"its model cannot be had: {_absent(error)}") from None

    def _report(self, run_id: str | None) -> tuple[bytes | None, str | None]:
        """Return the gate's report that a run keeps, or why there is none."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None, "it belongs to no run, so there is no report of the gate"
        try:
            if REPORT in self._list(run_id=run_id):
                return self._download(run_id=run_id, artifact_path=REPORT), None
        except MlflowException as error:
            return None, f"its run {run_id} cannot be had: {_absent(error)}"
        return None, f"its run {run_id} has no {REPORT}, the gate's report"

    def _list(self, **what: str) -> list[str]:
        from mlflow.artifacts import list_artifacts

        return [found.path for found in list_artifacts(tracking_uri=self.uri, **what)]

    def _download(self, **what: str) -> bytes:
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as folder:
            path = download_artifacts(dst_path=folder, tracking_uri=self.uri, **what)
            return Path(path).read_bytes()


def _absent(error: Exception) -> Exception:
    """Return an `AbsentError` if MLflow's error says that there is no such thing, else raise it."""
    if getattr(error, "error_code", None) not in ABSENT:
        raise error
    text = str(error).removeprefix(f"{getattr(error, 'error_code', '')}: ")
    return AbsentError(text.splitlines()[0].rstrip("."))


@dataclass
class Follower:
    """Keeps one source's folder at what its address means.

    Attributes:
        name: that it is served as.
        address: which version.
        folder: for its files.
        allow_unverified: whether the server serves what is not proven.
    """

    name: str
    address: Address
    folder: Path
    allow_unverified: bool
    _tried: tuple[str, float] = ("", 0.0)  # the version that was refused last, and when
    _trouble: str = ""  # its kind; none: all is well

    def look(self, registry: Registry) -> None:
        """Fetch the version that the address means, unless it has been.

        Raises:
            AbsentError: There is none.
            Exception: whatever MLflow raises for a store that is not usable.
        """
        version = registry.find(self.address)
        current, number = Current.read(self.folder), str(version.version)
        if current.fetched and current.fetched.number == number:
            if current.refused:  # the address means the one before again
                Current(current.fetched).write(self.folder)
            return
        refused, at = self._tried
        if refused == number and time.monotonic() - at < RETRY:
            return
        try:
            fetched = registry.fetch(version, self.folder)
            fetched.load(self.name, self.address, allow_unverified=self.allow_unverified)
        except (CheckFailedError, UserError) as error:
            self._tried = number, time.monotonic()
            self._refuse(current, number, str(error))
            return
        Current(fetched).write(self.folder)
        log("fetched", source=str(self.address), number=number, sha256=fetched.sha256)
        self._clean(fetched, current.fetched)

    def _refuse(self, current: Current, number: str, why: str) -> None:
        """Say so, which the server logs and counts."""
        if not why.startswith(str(self.address)):
            why = f"{self.address} (version {number} in MLflow) is not served: {why}"
        if current.refused != why:
            Current(current.fetched, why).write(self.folder)

    def _clean(self, *kept: Fetched | None) -> None:
        numbers = {one.number for one in kept if one}
        for place in self.folder.iterdir():
            if place.is_dir() and place.name not in numbers:
                shutil.rmtree(place, ignore_errors=True)

    def follow(self, registry: Registry) -> None:
        """Look, and log once that it cannot be done, and that it can be again.

        Raises:
            StoreReplacedError: The database is another one.
        """
        try:
            self.look(registry)
        except StoreReplacedError:
            raise
        except AbsentError as error:
            self._say("absent", str(error))
        except UserError as error:
            self._say("away", str(error))
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            self._say("away", trouble(error, registry.root))
        else:
            if self._trouble:
                self._trouble = ""
                log("registry back", source=str(self.address))

    def _say(self, kind: str, why: str) -> None:
        if self._trouble != kind:
            self._trouble = kind
            log(f"registry {kind}", "warning", source=str(self.address), why=without_password(why))


@dataclass(frozen=True)
class Order:
    """What the server asks of this process.

    Attributes:
        sources: name, address and folder of each.
        allow_unverified: whether the server serves what is not proven.
        period: seconds between looks; 0: there is only the first.
        starting: whether the server waits for the first look, and cannot start without.
    """

    sources: Sequence[tuple[str, str, str]]
    allow_unverified: bool
    period: float
    starting: bool

    def followers(self) -> list[Follower]:
        """Make what follows each source."""
        return [
            Follower(name, Address.parse(address), Path(folder), self.allow_unverified)
            for name, address, folder in self.sources
        ]


def first_look(followers: Sequence[Follower], registry: Registry) -> None:
    """Fetch what every source means.

    Raises:
        UserError: The store is away, or there is no such model, alias or version.
    """
    for follower in followers:
        try:
            follower.look(registry)
        except UserError:
            raise
        except AbsentError as error:
            raise UserError(
                f"no {follower.address} in MLflow at {without_password(registry.uri)}: {error}"
            ) from None
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            raise UserError(trouble(error, registry.root)) from None


def follow(followers: Sequence[Follower], registry: Registry, period: float) -> NoReturn:
    """Look again and again.

    Raises:
        StoreReplacedError: The database is another one.
    """
    while True:
        for follower in followers:
            follower.follow(registry)
        time.sleep(period)


def main() -> int:
    """Do what standard input asks for, until it closes.

    Returns:
        The exit status.
    """
    order = Order(**json.loads(received_line()))
    threading.Thread(target=end_with_server, daemon=True).start()
    logging.disable()  # the exceptions tell all that libraries would
    registry, followers = Registry(repository()), order.followers()
    if order.starting:
        problem = None
        try:
            first_look(followers, registry)
        except UserError as error:
            problem = str(error)
        print(json.dumps(problem), flush=True)  # noqa: T201 - the server's end of the pipe reads it
        if problem or not order.period:
            return 0
    gc.enable()
    gc.freeze()
    # what a number means does not change
    moving = [one for one in followers if one.address.alias]
    try:
        follow(moving, registry, order.period)
    except StoreReplacedError:
        log("registry replaced", "warning", uri=without_password(registry.uri))
        return STORE_REPLACED


def received_line() -> bytes:
    """Read the first line of standard input, and nothing past it."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            os._exit(0)  # the server has ended already
        line += byte
    return line


def end_with_server() -> None:
    """End this process as soon as the server's end of standard input is closed."""
    while os.read(0, 1 << 10):
        pass
    os._exit(0)


if __name__ == "__main__":
    gc.disable()  # a fifth of the time that MLflow takes to import; see cli.py
    try:
        status = main()
    except Exception as error:  # noqa: BLE001 - a traceback would be no line of the log
        log("failed", "error", doing="follow MLflow's registry", why=without_password(repr(error)))
        status = 1
    sys.stderr.flush()
    os._exit(status)  # nothing is left to do, and MLflow takes a while to end in good order
