"""What a bad export is, and how a family of them is listed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx

from tests.support.parity_cases import NETWORKS, Case

Files = dict[str, bytes]  # by name; one is FILE
Bad: TypeAlias = onnx.ModelProto | bytes | Files
Spoil = Callable[[Case], Bad]

FILE = "model.onnx"


@dataclass(frozen=True)
class Mutant:
    """A bad export of a case.

    Attributes:
        name: of its kind.
        family: of kinds that belong together.
        diagnosis: what the gate should call it.
        story: how it comes about.
        spoil: makes it.
        cases: the networks on which it can happen.
        latent: whether it computes, today, what the honest file computes.
    """

    name: str
    family: str
    diagnosis: str
    story: str
    spoil: Spoil
    cases: tuple[str, ...] = tuple(NETWORKS)
    latent: bool = False

    def make(self, case: Case, folder: Path) -> Path:
        """Write the bad export of a case to a folder; return the ONNX file's path."""
        bad = self.spoil(case)
        if isinstance(bad, onnx.ModelProto):
            bad = bad.SerializeToString()
        files = bad if isinstance(bad, dict) else {FILE: bad}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder / FILE


class Family:
    """Collects the mutants of a module: ``@mutant("diagnosis")`` above a function, or `add`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mutants: list[Mutant] = []

    def __call__(
        self, diagnosis: str, *, cases: Iterable[str] = NETWORKS, latent: bool = False
    ) -> Callable[[Spoil], Spoil]:
        def register(spoil: Spoil) -> Spoil:
            assert spoil.__doc__
            self.add(spoil.__name__, diagnosis, spoil.__doc__, spoil, cases=cases, latent=latent)
            return spoil

        return register

    def add(
        self,
        name: str,
        diagnosis: str,
        story: str,
        spoil: Spoil,
        *,
        cases: Iterable[str] = NETWORKS,
        latent: bool = False,
    ) -> None:
        """Add a kind that a function makes for several values."""
        story = " ".join(story.split())
        self.mutants.append(Mutant(name, self.name, diagnosis, story, spoil, tuple(cases), latent))
