"""Select the files that model signing hashes. Imports the library: import this lazily.

By default the library hashes everything in a folder except what the signature says to ignore.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from model_signing import hashing, manifest


class SelectedFiles(hashing.Config):
    """Hashes the files that a function selects, whatever a signature says to ignore.

    Attributes:
        hashes: SHA-256 of each file by its name in the folder; None until the library hashes,
            which it does after it has authenticated the signature.
    """

    def __init__(self, select: Callable[[Path], Iterable[Path]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped
        # DVC may link outputs into its cache; their targets are signed
        self.set_allow_symlinks(True)
        self._select = select
        self.hashes: dict[str, str] | None = None

    def hash(
        self,
        model_path: hashing.PathLike,
        *,
        files_to_hash: Iterable[hashing.PathLike] | None = None,
    ) -> manifest.Manifest:
        """Hash the selected files, and the files named by a signature, as far as they exist."""
        folder = Path(os.fsdecode(model_path))
        selected = {
            *self._select(folder),
            *(Path(os.fsdecode(path)) for path in files_to_hash or ()),
        }
        present = sorted(path for path in selected if path.is_file())
        hashed = super().hash(folder, files_to_hash=present)
        self.hashes = {
            item.identifier: item.digest.digest_hex for item in hashed.resource_descriptors()
        }
        return hashed

    def add_ignored_paths(
        self, *, model_path: hashing.PathLike, paths: Iterable[hashing.PathLike]
    ) -> None:
        """Do nothing: a signature cannot exclude files."""
