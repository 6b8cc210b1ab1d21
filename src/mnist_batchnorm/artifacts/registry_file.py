"""The registry, ``models/registry.json``: all versions of the models, and who made which champion.

The file is in git and is not an output of a stage: the files of one run do not determine which
version was champion before, or whether someone rolled it back. What the rules write contains
neither time nor user, so the same inputs give the same bytes.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from filelock import FileLock, Timeout
from pydantic import Field, StringConstraints, ValidationError, model_validator

from mnist_batchnorm.artifacts.reading import StrictRecord, first_problem
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import fingerprint, write_text
from mnist_batchnorm.core.paths import REGISTERED, REGISTRY

LOCK = ".registry.lock"  # beside the registry, ignored by git
LOCK_TIMEOUT_S = 60.0  # it is held while two small files are read and written

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Utc = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
VersionNumber = Annotated[int, Field(ge=1)]
TestImageIndex = Annotated[int, Field(ge=0)]  # position in MNIST's test file
Figure = int | float


class Hashes(StrictRecord):
    """A file's SHA-256, and the MD5 that is its key in DVC's cache."""

    sha256: Sha256
    md5: Md5


class RuleResult(StrictRecord):
    """The result of one rule.

    Attributes:
        passed: whether the rule allows the version to become champion.
        says: the reason, a sentence with the numbers.
        numbers: the numbers themselves; those of one file under its registered name.
    """

    passed: bool
    says: str
    numbers: dict[str, Figure | str | dict[str, Figure]]


class Decision(StrictRecord):
    """The last decision about a version.

    Attributes:
        outcome: ``promoted``: champion by the rules; ``refused``: not champion; ``kept``: champion
            although a rule refuses it.
        rules: result of each rule by its name.
    """

    outcome: Literal["promoted", "refused", "kept"]
    rules: dict[str, RuleResult]

    @property
    def refusals(self) -> dict[str, RuleResult]:
        """The results of the rules that refuse."""
        return {name: result for name, result in self.rules.items() if not result.passed}

    def describe_refusals(self) -> str:
        """Return the refusing rules and their reasons on one line."""
        return "; ".join(f"{name}: {result.says}" for name, result in self.refusals.items())


class Measured(StrictRecord):
    """The files of one network, and the test images that each misclassifies.

    Attributes:
        weights_sha256: of the checkpoint.
        test_sha256: of the test split.
        test_images: number of test images.
        files: the ONNX files by registered name.
        errors: ascending positions of the misclassified images, by registered name.
    """

    weights_sha256: Sha256
    test_sha256: Sha256
    test_images: Annotated[int, Field(ge=1)]
    files: dict[str, Hashes]
    errors: dict[str, tuple[TestImageIndex, ...]]

    @model_validator(mode="after")
    def _check_names_and_errors(self) -> Self:
        for by_name in (self.files, self.errors):
            if by_name.keys() != REGISTERED.keys():
                raise ValueError(f"is about {', '.join(by_name)}, not {', '.join(REGISTERED)}")
        for errors in self.errors.values():
            if list(errors) != sorted(set(errors)) or len(errors) > self.test_images:
                raise ValueError("errors are not the ascending positions of some test images")
        return self

    def accuracy(self, name: str) -> float:
        """Return a file's accuracy on the test images, 0 to 1."""
        return (self.test_images - len(self.errors[name])) / self.test_images


class Version(Measured):
    """Two files that were registered together, and the last decision about them."""

    version: VersionNumber
    decision: Decision


class PromotedByRules(StrictRecord):
    """Every rule allowed it."""

    event: Literal["promoted"] = "promoted"
    version: VersionNumber
    by: Literal["rules"] = "rules"


class PromotedByOverride(StrictRecord):
    """A person promoted it against the rules."""

    event: Literal["promoted"] = "promoted"
    version: VersionNumber
    by: Literal["override"] = "override"
    who: NonEmpty
    when: Utc
    why: NonEmpty


class RolledBack(StrictRecord):
    """A person restored the previous champion; ``why`` is None if no reason was given."""

    event: Literal["rolled back"] = "rolled back"
    version: VersionNumber
    to: VersionNumber
    who: NonEmpty
    when: Utc
    why: NonEmpty | None


Promotion = Annotated[PromotedByRules | PromotedByOverride, Field(discriminator="by")]
Event = Annotated[Promotion | RolledBack, Field(discriminator="event")]


class Ledger(StrictRecord):
    """All versions, and all events in order; immutable.

    The champion follows from the events: a promotion pushes a version on a stack, a rollback pops
    it, and the top is the champion. So a second rollback goes further back.
    """

    format: Literal[1] = Field(1, alias="schema")
    versions: tuple[Version, ...] = ()
    events: tuple[Event, ...] = ()

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if [v.version for v in self.versions] != list(range(1, len(self.versions) + 1)):
            raise ValueError("the versions are not numbered 1, 2, 3, ...")
        for version in self.versions:
            if self.find(version.files) is not version:
                raise ValueError(f"version {version.version} is of the same files as another")
        self._champion_stack()
        self._check_parity_of_champions()
        return self

    def _check_parity_of_champions(self) -> None:
        # neither the stage nor the commands write a champion without the gate's verdict
        for number in {event.version for event in self.events}:
            if "parity" not in self.versions[number - 1].decision.rules:
                raise ValueError(f"version {number} was promoted, but its parity was never judged")
        champion = self.champion
        if (
            champion
            and "parity" in champion.decision.refusals
            and champion.decision.outcome != "kept"
        ):
            raise ValueError(f"version {champion.version} is champion, but has no parity")

    def _champion_stack(self) -> list[int]:
        stack: list[int] = []
        for event in self.events:
            if event.version > len(self.versions):
                raise ValueError(f"version {event.version} was {event.event}, but there is none")
            if isinstance(event, RolledBack):
                if stack[-2:] != [event.to, event.version]:
                    raise ValueError(
                        f"version {event.version} was rolled back to {event.to}, but these were "
                        "not the champion and the one before it"
                    )
                stack.pop()
            elif stack[-1:] != [event.version]:
                stack.append(event.version)
        return stack

    @property
    def champion(self) -> Version | None:
        """The version to serve; None before the first promotion."""
        stack = self._champion_stack()
        return self.versions[stack[-1] - 1] if stack else None

    @property
    def headline(self) -> str:
        """A line that names the champion."""
        return f"champion: version {self.champion.version}" if self.champion else "no champion yet"

    @property
    def previous_champions(self) -> tuple[Version, ...]:
        """The versions that rollbacks would restore, the next one first."""
        return tuple(self.versions[number - 1] for number in reversed(self._champion_stack()[:-1]))

    def find(self, files: Mapping[str, Hashes]) -> Version | None:
        """Return the version with exactly these files, if any."""
        return next((version for version in self.versions if version.files == files), None)

    def history_hashes(self) -> list[str]:
        """Return a hash of the history up to each event: equal hashes, equal histories."""
        hashes, last = [], ""
        for event in self.events:
            files = self.versions[event.version - 1].model_dump(include={"files"})
            last = fingerprint({"before": last, "event": event.model_dump(), **files})
            hashes.append(last)
        return hashes

    def was_rolled_back(self, number: int) -> bool:
        """Whether a version was ever rolled back."""
        return any(isinstance(e, RolledBack) and e.version == number for e in self.events)

    def number_of(self, files: Mapping[str, Hashes]) -> int:
        """Return the version number of files; the next free one if they are not registered."""
        known = self.find(files)
        return known.version if known else len(self.versions) + 1

    def with_version(self, measured: Measured, decision: Decision) -> "Ledger":
        """Return a ledger with these files' present measurement and decision.

        Registered files keep their number.
        """
        number = self.number_of(measured.files)
        fields = {name: getattr(measured, name) for name in Measured.model_fields}
        version = Version(version=number, decision=decision, **fields)
        versions = (*self.versions[: number - 1], version, *self.versions[number:])
        return Ledger(versions=versions, events=self.events)

    def with_event(self, event: PromotedByRules | PromotedByOverride | RolledBack) -> "Ledger":
        """Return a ledger with this event appended; promoting the champion changes nothing."""
        champion = self.champion
        if not isinstance(event, RolledBack) and champion and champion.version == event.version:
            return self
        return Ledger(versions=self.versions, events=(*self.events, event))

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Read a ledger; a missing file is an empty one.

        Raises:
            UserError: The file cannot be read, is not a ledger, or contradicts itself.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if re.search(rb"^(<{7}|>{7}) ", content, re.MULTILINE):
            raise UserError(
                f"{path} holds both sides of a merge: take one with `git checkout --ours -- {path}`"
                " or --theirs, then register what the other side had with `mnist-bn register`"
            )
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            problem = first_problem(error).replace(": Value error, ", ": ", 1)
            raise UserError(
                f"{path} is not a ledger: {problem}; restore it with `git checkout -- {path}`"
            ) from None

    def save(self, path: Path) -> None:
        """Write it atomically, each list of errors on one line for ``git diff``."""
        content = self.model_dump(mode="json", by_alias=True)
        content["versions"] = [{"version": v.pop("version"), **v} for v in content["versions"]]
        text = json.dumps(content, indent=2, allow_nan=False)
        # matches lists of numbers only: JSON escapes line breaks in strings
        text = re.sub(
            r"\[\n([\d,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text
        )
        write_text(path, text + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the ledger's inter-process lock.

    Raises:
        UserError: Another process has held it for `LOCK_TIMEOUT_S`.
    """
    lock = FileLock(path.with_name(LOCK), timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path} is being changed by another process; try again when that has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


def registered_version(sha256: str) -> str | None:
    """Return the version in ``models/registry.json`` that has a file with this hash, if any."""
    for version in Ledger.load(REGISTRY).versions:
        if sha256 in {file.sha256 for file in version.files.values()}:
            return str(version.version)
    return None
