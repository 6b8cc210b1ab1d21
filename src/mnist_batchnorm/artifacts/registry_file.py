"""The registry as a file: every version of the models, and what made which of them champion.

``models/registry.json`` lies in git. It is state, no output of a stage: what follows from the files
of one run cannot say which version was champion before, or that somebody rolled it back. Nothing
that the rules write holds a time or a user, so the same inputs give the same bytes.
"""

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from filelock import FileLock, Timeout
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import fingerprint, write_text
from mnist_batchnorm.core.paths import REGISTERED

LOCK = ".registry.lock"  # beside the ledger; git ignores it
LOCK_TIMEOUT = 60.0  # seconds; it is held for the reading and writing of two small files
WIDTH = 100  # of a line of a table

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Utc = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Number = Annotated[int, Field(ge=1)]
Position = Annotated[int, Field(ge=0)]  # of a test image in MNIST's file
Figure = int | float


class Entry(BaseModel):
    """A part of the ledger: unknown keys and lossy conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Hashes(Entry):
    """What identifies a file: SHA-256, and the MD5 under which DVC's cache has it."""

    sha256: Sha256
    md5: Md5


class Rule(Entry):
    """What one rule found.

    Attributes:
        passed: whether it allows the version to become champion.
        says: why, a sentence with the numbers.
        numbers: the numbers themselves, those of one file under its registered name.
    """

    passed: bool
    says: str
    numbers: dict[str, Figure | str | dict[str, Figure]]


class Decision(Entry):
    """What became of a version when the rules last judged it.

    Attributes:
        outcome: ``promoted``: champion by the rules; ``refused``: not champion; ``kept``: champion
            although a rule refuses it.
        rules: each rule's finding, by its name.
    """

    outcome: Literal["promoted", "refused", "kept"]
    rules: dict[str, Rule]

    @property
    def refusals(self) -> dict[str, Rule]:
        """The rules that refuse."""
        return {name: rule for name, rule in self.rules.items() if not rule.passed}

    def table(self) -> str:
        """Return the findings for people, a line a rule."""
        lines = []
        for name, rule in self.rules.items():
            head = f"  {'ok' if rule.passed else 'REFUSED':<7}  {name:<9}  "
            indent = " " * len(head)
            lines.append(
                textwrap.fill(
                    rule.says,
                    WIDTH,
                    initial_indent=head,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        return "\n".join(lines)


class Measured(Entry):
    """The files of one network, and which test images each gets wrong.

    Attributes:
        weights_sha256: of the checkpoint.
        test_sha256: of the test images.
        test_images: how many they are.
        files: the ONNX files by registered name.
        errors: the images that each gets wrong, by their position in MNIST's test file.
    """

    weights_sha256: Sha256
    test_sha256: Sha256
    test_images: Annotated[int, Field(ge=1)]
    files: dict[str, Hashes]
    errors: dict[str, tuple[Position, ...]]

    @model_validator(mode="after")
    def _of_every_name(self) -> Self:
        for held in (self.files, self.errors):
            if held.keys() != REGISTERED.keys():
                raise ValueError(f"is about {', '.join(held)}, not {', '.join(REGISTERED)}")
        for errors in self.errors.values():
            if list(errors) != sorted(set(errors)) or len(errors) > self.test_images:
                raise ValueError("errors are not the ascending positions of some test images")
        return self

    def accuracy(self, name: str) -> float:
        """Return the share of the test images that a file gets right."""
        return (self.test_images - len(self.errors[name])) / self.test_images


class Version(Measured):
    """Two files that were registered together.

    Attributes:
        version: its number, 1 and up.
        decision: what the rules last said about it.
    """

    version: Number
    decision: Decision


class PromotedByRules(Entry):
    """Every rule allowed it; says nothing that the inputs do not determine."""

    event: Literal["promoted"] = "promoted"
    version: Number
    by: Literal["rules"] = "rules"


class PromotedByOverride(Entry):
    """Somebody wanted it whatever the rules say."""

    event: Literal["promoted"] = "promoted"
    version: Number
    by: Literal["override"] = "override"
    who: NonEmpty
    when: Utc
    why: NonEmpty


class RolledBack(Entry):
    """Somebody put the champion before it back; ``why`` is None where no reason was given."""

    event: Literal["rolled back"] = "rolled back"
    version: Number
    to: Number
    who: NonEmpty
    when: Utc
    why: NonEmpty | None


Promotion = Annotated[PromotedByRules | PromotedByOverride, Field(discriminator="by")]
Event = Annotated[Promotion | RolledBack, Field(discriminator="event")]


class Ledger(Entry):
    """All versions, and all events in their order.

    The champion is not written down: a promotion puts a version on top of a pile, a rollback takes
    the top off, and the champion is the top. So a second rollback goes further back.
    """

    format: Literal[1] = Field(1, alias="schema")
    versions: tuple[Version, ...] = ()
    events: tuple[Event, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [v.version for v in self.versions] != list(range(1, len(self.versions) + 1)):
            raise ValueError("the versions are not numbered 1, 2, 3, ...")
        for version in self.versions:
            if self.find(version.files) is not version:
                raise ValueError(f"version {version.version} is of the same files as another")
        self._pile()
        self._parity_of_champions()
        return self

    def _parity_of_champions(self) -> None:
        """Refuse what only an editor could have written: a champion without the gate's word."""
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

    def _pile(self) -> list[int]:
        pile: list[int] = []
        for event in self.events:
            if event.version > len(self.versions):
                raise ValueError(f"version {event.version} was {event.event}, but there is none")
            if isinstance(event, RolledBack):
                if pile[-2:] != [event.to, event.version]:
                    raise ValueError(
                        f"version {event.version} was rolled back to {event.to}, but these were "
                        "not the champion and the one before it"
                    )
                pile.pop()
            elif pile[-1:] != [event.version]:
                pile.append(event.version)
        return pile

    @property
    def champion(self) -> Version | None:
        """The version to serve; None before the first promotion."""
        pile = self._pile()
        return self.versions[pile[-1] - 1] if pile else None

    @property
    def headline(self) -> str:
        """Which version is champion, for people."""
        return f"champion: version {self.champion.version}" if self.champion else "no champion yet"

    @property
    def previous_champions(self) -> tuple[Version, ...]:
        """The versions that rollbacks would put back, the next one first."""
        return tuple(self.versions[number - 1] for number in reversed(self._pile()[:-1]))

    def find(self, files: Mapping[str, Hashes]) -> Version | None:
        """Return the version that consists of these files, if there is one."""
        return next((version for version in self.versions if version.files == files), None)

    def marks(self) -> list[str]:
        """Return a hash of the history after each event: equal marks are equal histories."""
        marks, last = [], ""
        for event in self.events:
            files = self.versions[event.version - 1].model_dump(include={"files"})
            last = fingerprint({"before": last, "event": event.model_dump(), **files})
            marks.append(last)
        return marks

    def was_rolled_back(self, number: int) -> bool:
        """Tell whether anybody has ever rolled this version back."""
        return any(isinstance(e, RolledBack) and e.version == number for e in self.events)

    def number_of(self, files: Mapping[str, Hashes]) -> int:
        """Return the number that these files have, or would get."""
        known = self.find(files)
        return known.version if known else len(self.versions) + 1

    def with_version(self, measured: Measured, decision: Decision) -> "Ledger":
        """Return a ledger that holds these files as they are measured and judged now.

        Files that it knows keep their number.
        """
        number = self.number_of(measured.files)
        fields = {name: getattr(measured, name) for name in Measured.model_fields}
        version = Version(version=number, decision=decision, **fields)
        versions = (*self.versions[: number - 1], version, *self.versions[number:])
        return Ledger(versions=versions, events=self.events)

    def with_event(self, event: PromotedByRules | PromotedByOverride | RolledBack) -> "Ledger":
        """Return a ledger in which this happened last; to promote the champion changes nothing."""
        champion = self.champion
        if not isinstance(event, RolledBack) and champion and champion.version == event.version:
            return self
        return Ledger(versions=self.versions, events=(*self.events, event))

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Read a ledger; where there is none, it is empty.

        Raises:
            UserError: The file cannot be read, is no ledger, or contradicts itself.
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
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"]) or "the file"
            reason = problem["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{path} is no ledger: {where}: {reason}; restore it with `git checkout -- {path}`"
            ) from None

    def save(self, path: Path) -> None:
        """Write it, whole or not at all, with each list of errors on a line, for ``git diff``."""
        content = self.model_dump(mode="json", by_alias=True)
        content["versions"] = [{"version": v.pop("version"), **v} for v in content["versions"]]
        text = json.dumps(content, indent=2, allow_nan=False)
        # lists of numbers only: no string holds a line break, JSON escapes it
        text = re.sub(
            r"\[\n([\d,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text
        )
        write_text(path, text + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process from changing the ledger during the block.

    Raises:
        UserError: Another process has kept it for a minute.
    """
    lock = FileLock(path.with_name(LOCK), timeout=LOCK_TIMEOUT)
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
