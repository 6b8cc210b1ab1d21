"""Models of MLflow's registry, as the child process `fetch` lays them down for the server.

For each source a folder holds the fetched versions and ``current.json``, which says what of them to
serve. Nothing here imports MLflow.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.catalog import State, stamp
from mnist_batchnorm.serve.core.models import Model

SCHEME = "models:/"
CURRENT = "current.json"
REPORT = "parity.json"  # the gate's report, as the run of a version keeps it
# of a model's name MLflow forbids / and :, an alias is of letters, digits, _ and -
URI = re.compile(r"models:/(?P<model>[^/:@]+)(@(?P<alias>[\w-]+)|/(?P<number>[1-9][0-9]*))")


@dataclass(frozen=True)
class Address:
    """Which version of a registered model is meant.

    Attributes:
        model: its name in MLflow.
        alias: that points at the version; None: the number says it.
        number: the version, as MLflow counts; None: the alias says it.
    """

    model: str
    alias: str | None
    number: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

        Raises:
            UserError: It is neither.
        """
        found = URI.fullmatch(text)
        if not found:
            raise UserError(
                f"{text}: expected models:/NAME@ALIAS or models:/NAME/VERSION, "
                "as in models:/mnist-bn@champion"
            )
        return cls(**found.groupdict())

    def __str__(self) -> str:
        """Return it as it was read."""
        which = f"@{self.alias}" if self.alias else f"/{self.number}"
        return f"{SCHEME}{self.model}{which}"


@dataclass(frozen=True)
class Fetched:
    """A version whose files have been fetched.

    Attributes:
        number: as MLflow counts.
        version: that clients see: the ledger's number, where MLflow knows it, else MLflow's.
        sha256: of the ONNX file.
        onnx: where that lies.
        parity: where the gate's report of its run lies, or would.
        unreported: why there is no such report; None: there is one.
    """

    number: str
    version: str
    sha256: str
    onnx: Path
    parity: Path
    unreported: str | None

    def load(self, name: str, address: Address, *, allow_unverified: bool) -> Model:
        """Load it, if the report is about these very bytes and passed them; see `models.load`.

        Raises:
            UserError: It is not a model with this project's interface.
            CheckFailedError: It is not proven.
        """
        what = f"{address} (version {self.number} in MLflow)"

        def checked(problem: str | None) -> str | None:
            if not problem:
                return None
            problem = problem.replace(str(self.parity), f"its run's {REPORT}")
            if not allow_unverified:
                raise CheckFailedError(
                    f"{what} is not served: {problem}; run `mnist-bn sync` where it was verified, "
                    "or take the risk with --allow-unverified"
                )
            return problem

        problem = checked(self.unreported or models.why_unproven(self.sha256, self.parity))
        try:
            model = models.load(name, self.onnx, self.parity, self.version, allow_unverified=True)
        except UserError as error:
            raise UserError(str(error).replace(str(self.onnx), what)) from None
        return replace(model, unproven=problem or checked(model.unproven))


@dataclass(frozen=True)
class Current:
    """What of a source to serve.

    Attributes:
        fetched: the version; None: none was fit so far.
        refused: why the version that the address means now is not that one; None: it is.
    """

    fetched: Fetched | None = None
    refused: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what a source's folder says; nothing, where nothing has been fetched."""
        try:
            content: dict[str, Any] = json.loads((folder / CURRENT).read_bytes())
        except FileNotFoundError:
            return cls()
        there = content["fetched"]
        if there is None:
            return cls(None, content["refused"])
        paths = {name: Path(there[name]) for name in ("onnx", "parity")}
        return cls(Fetched(**there | paths), content["refused"])

    def write(self, folder: Path) -> None:
        """Put it in place of what the folder says."""
        content = asdict(self)
        if self.fetched:
            content["fetched"] |= {
                "onnx": str(self.fetched.onnx),
                "parity": str(self.fetched.parity),
            }
        write_json(folder / CURRENT, content)


@dataclass
class RegisteredSource:
    """A model of MLflow's registry.

    Attributes:
        name: that it is served as.
        address: which version.
        folder: where `fetch` lays it down.
        allow_unverified: serve it whatever the report says.
    """

    name: str
    address: Address
    folder: Path
    allow_unverified: bool = False
    _loaded: bool = field(init=False, default=False)

    def state(self) -> State:
        """Return what differs as soon as `fetch` has said something new."""
        return stamp(self.folder / CURRENT)

    def load(self) -> Model:
        """Load the version that the address means; in a new process, the last one that was fit.

        Raises:
            UserError: Nothing was fetched, or it is not a model with this project's interface.
            CheckFailedError: It is not fit to be served.
        """
        current = Current.read(self.folder)
        # a process that starts anew has nothing else to go on with
        if current.refused and (self._loaded or not current.fetched):
            raise CheckFailedError(current.refused)
        if not current.fetched:
            raise UserError(f"{self.address} has not been fetched from MLflow")
        model = current.fetched.load(
            self.name, self.address, allow_unverified=self.allow_unverified
        )
        self._loaded = True
        return model
