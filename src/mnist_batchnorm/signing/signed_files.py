"""Which files of a folder model signing looks at. Imports it: import this only where it is needed.

By itself the library looks at everything in a folder except what the signature says to ignore.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from model_signing import hashing, manifest


class SignedFiles(hashing.Config):
    """Hashes the files that a function selects, no matter what a signature says to ignore.

    Attributes:
        found: SHA-256 of each file by its name in the folder; None before anything was hashed,
            which the library does after it has found the signature to be the key's.
    """

    def __init__(self, select: Callable[[Path], Iterable[Path]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it says not what it returns
        # DVC can keep outputs as links into its cache; what is signed is the bytes behind them
        self.set_allow_symlinks(True)
        self._select = select
        self.found: dict[str, str] | None = None

    def hash(
        self,
        model_path: hashing.PathLike,
        *,
        files_to_hash: Iterable[hashing.PathLike] | None = None,
    ) -> manifest.Manifest:
        """Hash what is selected and there.

        Args:
            model_path: the folder.
            files_to_hash: these too: the files that a signature names.
        """
        folder = Path(os.fsdecode(model_path))
        wanted = {*self._select(folder), *(Path(os.fsdecode(path)) for path in files_to_hash or ())}
        present = sorted(path for path in wanted if path.is_file())
        hashed = super().hash(folder, files_to_hash=present)
        self.found = {
            item.identifier: item.digest.digest_hex for item in hashed.resource_descriptors()
        }
        return hashed

    def add_ignored_paths(
        self, *, model_path: hashing.PathLike, paths: Iterable[hashing.PathLike]
    ) -> None:
        """Do nothing: a signature does not say which files need none."""
