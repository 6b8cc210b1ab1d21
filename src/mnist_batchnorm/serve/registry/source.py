"""Models of MLflow's registry as the server loads them, from files that `registry.child` fetched.

Each source has a folder with the fetched versions and ``current.json``, which names the one to
serve. Nothing here imports MLflow.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from mnist_batchnorm.artifacts.parity_report import why_unproven
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.catalog import State, stamp
from mnist_batchnorm.serve.core.models import Model

SCHEME = "models:/"
CURRENT = "current.json"
REPORT = "parity.json"  # the gate's report among the artifacts of a version's run
# MLflow forbids / and : in a model's name; an alias consists of letters, digits, _ and -
URI = re.compile(r"models:/(?P<model>[^/:@]+)(@(?P<alias>[\w-]+)|/(?P<number>[1-9][0-9]*))")


@dataclass(frozen=True)
class Address:
    """MLflow's URI of a registered model's version, by alias or by number.

    Attributes:
        model: name in MLflow.
        alias: None if the version is given by its number.
        number: MLflow's version number; None if the version is given by an alias.
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
        which = f"@{self.alias}" if self.alias else f"/{self.number}"
        return f"{SCHEME}{self.model}{which}"


@dataclass(frozen=True)
class Fetched:
    """A version whose files have been fetched.

    Attributes:
        number: MLflow's version number.
        version: the version clients see: the ledger's number if MLflow has it, else MLflow's.
        sha256: hash of the ONNX file.
        unreported: why its run has no parity report; None if it has one.
    """

    number: str
    version: str
    sha256: str
    unreported: str | None


@dataclass(frozen=True)
class Current:
    """The content of ``current.json``: which version of a source to serve."""

    fetched: Fetched | None = None  # None: no version was accepted so far
    refused: str | None = None  # why the version that the address means now is not served

    @classmethod
    def read(cls, folder: Path) -> Self:
        try:
            content = json.loads((folder / CURRENT).read_bytes())
        except FileNotFoundError:
            return cls()
        fetched = content["fetched"]
        return cls(fetched and Fetched(**fetched), content["refused"])

    def write(self, folder: Path) -> None:
        write_json(folder / CURRENT, asdict(self))


@dataclass
class RegisteredSource:
    """A served model of MLflow's registry."""

    name: str
    address: Address
    folder: Path
    allow_unverified: bool = False
    _loaded: bool = field(init=False, default=False)

    def state(self) -> State:
        return stamp(self.folder / CURRENT)

    def onnx(self, number: str) -> Path:
        return self.folder / number / "model.onnx"

    def parity(self, number: str) -> Path:
        return self.folder / number / REPORT

    def load(self) -> Model:
        """Load the version that the address means; in a new process, the last accepted one."""
        current = Current.read(self.folder)
        # a new process has no earlier version to keep serving
        if current.refused and (self._loaded or not current.fetched):
            raise CheckFailedError(current.refused)
        if not current.fetched:
            raise UserError(f"{self.address} has not been fetched from MLflow")
        model = self.load_version(current.fetched)
        self._loaded = True
        return model

    def load_version(self, fetched: Fetched) -> Model:
        """Load a version if its report proves these bytes; see `models.load`.

        Raises:
            UserError: The file is not a model with this project's interface.
            CheckFailedError: The model is not proven.
        """
        label = f"{self.address} (version {fetched.number} in MLflow)"
        onnx, parity = self.onnx(fetched.number), self.parity(fetched.number)

        def checked(problem: str | None) -> str | None:
            if not problem:
                return None
            problem = problem.replace(str(parity), f"its run's {REPORT}")
            if not self.allow_unverified:
                raise CheckFailedError(
                    f"{label} is not served: {problem}; run `mnist-bn sync` where it was verified, "
                    "or take the risk with --allow-unverified"
                )
            return problem

        problem = checked(fetched.unreported or why_unproven(fetched.sha256, parity))
        try:
            model = models.load(self.name, onnx, parity, fetched.version, allow_unverified=True)
        except UserError as error:
            raise UserError(str(error).replace(str(onnx), label)) from None
        return replace(model, unproven=problem or checked(model.unproven))
