"""Commits and DVC experiments that hold a result, and their files.

A result is identified by the MD5 that ``dvc.lock`` records for one of its files.
"""

import contextlib
import functools
import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import DVC_FILE, LOCK_FILE, MODELS, REPORTS, TEST_SPLIT
from mnist_batchnorm.lineage.dvc_lock import MD5_ENTRY, md5_by_path, output_files, parse_stages

EXPERIMENT_REF = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(?P<name>[^/]+)")
GIT_HOOK_VARIABLES = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")
# the user's settings must not add to git's output
PLAIN_OUTPUT = ("-c", "color.ui=false", "-c", "log.showSignature=false")
COMMITS = ("HEAD", "--branches", "--tags", "--remotes")  # without experiments


class Experiment(NamedTuple):
    """A DVC experiment; the name is unique only among those on top of one commit."""

    name: str
    commit: str


class Provenance(NamedTuple):
    """Where a result is recorded.

    Attributes:
        commit: the oldest commit that contains it, else the newest experiment that does, else the
            commit checked out; None without git.
        recorded: whether that commit contains it.
        experiments: names of the DVC experiments that contain it, sorted.
        deps: MD5 of each dependency of its stage by path, from that commit's ``dvc.lock``.
    """

    commit: str | None = None
    recorded: bool = False
    experiments: tuple[str, ...] = ()
    deps: Mapping[str, str] | None = None


class GitHistory:
    """The git repository that contains the project.

    Args:
        root: folder of ``dvc.yaml``; not necessarily the repository's top folder.

    Attributes:
        missing_from_cache: paths in DVC's cache that were looked up and did not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing_from_cache: set[Path] = set()

    @functools.cached_property
    def head(self) -> str | None:
        """The commit checked out; None without git.

        None also for a source archive that was unpacked inside another repository.
        """
        found = self._git("rev-parse", "HEAD", f"HEAD:./{DVC_FILE}")
        return found.split()[0] if found else None

    @functools.cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """The DVC experiments, oldest first."""
        if not self.head:
            return ()
        form = "--format=%(objectname) %(refname)"
        listed = self._git("for-each-ref", "--sort=creatordate", form, "refs/exps") or ""
        lines = [line.partition(" ") for line in listed.splitlines()]
        return tuple(
            Experiment(match["name"], commit)
            for commit, _, name in lines
            if (match := EXPERIMENT_REF.fullmatch(name))
        )

    def provenance(self, stage: str, md5: str) -> Provenance:
        """Find where an output of a stage is recorded, by its MD5."""
        commit, experiments = self.first_commit(md5), self.experiments_with(md5)
        if commit is None and experiments:
            commit = experiments[-1].commit
        if commit is None:
            return Provenance(self.head)
        deps = md5_by_path(self.lock_stages(commit).get(stage, {}), "deps")
        names = tuple(sorted({experiment.name for experiment in experiments}))
        return Provenance(commit, recorded=True, experiments=names, deps=deps)

    def first_commit(self, md5: str) -> str | None:
        """Return the oldest commit, without experiments, whose ``dvc.lock`` lists a file.

        None in a shallow clone, where the first commit cannot be known.
        """
        if self.head is None or self._shallow:
            return None
        found = self._git(
            # includes commits that a merge dropped, and results of the merge itself
            *("log", "--full-history", "-m"),
            *("--reverse", "--topo-order", "--format=%H", f"-S{md5}"),
            *(*COMMITS, "--", str(LOCK_FILE)),
        )
        return found.split()[0] if found else None

    @functools.cached_property
    def _shallow(self) -> bool:
        return (self._git("rev-parse", "--is-shallow-repository") or "").strip() == "true"

    def experiments_with(self, md5: str) -> list[Experiment]:
        """Return the experiments whose ``dvc.lock`` lists a file, oldest first."""
        if not self.experiments:
            return []
        commits = {experiment.commit for experiment in self.experiments}
        found = self._git("grep", "-F", "-l", md5, *commits, "--", str(LOCK_FILE)) or ""
        matching = {line.partition(":")[0] for line in found.splitlines()}
        return [experiment for experiment in self.experiments if experiment.commit in matching]

    def commits_by_result(self, outs: Sequence[Path]) -> list[list[str]]:
        """Group commits and experiments by their result; newest first within and among groups.

        Args:
            outs: outputs whose MD5s in ``dvc.lock`` identify a result.
        """
        if self.head is None:
            return []
        order = ("rev-list", "--full-history", "--reverse", "--topo-order")
        listed = self._git(*order, *COMMITS, "--", str(LOCK_FILE), str(REPORTS)) or ""
        groups: dict[tuple[str | None, ...], list[str]] = {}
        for commit in [*listed.split(), *(experiment.commit for experiment in self.experiments)]:
            md5 = dict(MD5_ENTRY.findall(self._lock_text(commit)))
            result = tuple(md5.get(path.as_posix()) for path in outs)
            if any(result):
                groups[result] = [commit, *groups.pop(result, [])]
        return list(groups.values())

    def lock_stages(self, commit: str) -> dict[str, dict[str, Any]]:
        """Return the stages in a commit's ``dvc.lock``; empty if it is missing or malformed."""
        return parse_stages(self._lock_text(commit))

    def _lock_text(self, commit: str) -> str:
        return self._git("show", f"{commit}:./{LOCK_FILE}") or ""

    def describe(self, commit: str) -> str:
        """Return a commit's short hash and subject."""
        return (self._git("log", "-1", "--format=%h %s", commit) or commit[:7]).strip()

    def has_file(self, path: Path) -> bool:
        """Whether the commit checked out contains a file."""
        return self._git("cat-file", "-e", f"HEAD:./{path.as_posix()}") is not None

    def refs(self) -> str:
        """Return HEAD and all refs; changes with every new or deleted commit or experiment."""
        names = ("refs/heads", "refs/tags", "refs/remotes", "refs/exps")
        return f"{self.head}\n{self._git('for-each-ref', *names)}"

    def is_dirty(self, paths: list[str]) -> bool:
        """Whether files in the current folder differ from the commit checked out there."""
        return self._git("status", "--porcelain", "--", *paths, folder=Path.cwd()) != ""

    @contextlib.contextmanager
    def checkout(self, commit: str) -> Iterator[tuple[Path, list[str]]]:
        """Write a commit's files, and its results from DVC's cache, to a temporary folder.

        Yields:
            The folder, and the results that are neither in git nor in DVC's cache.

        Raises:
            UserError: git does not have the commit's files, as in a partial clone.
        """
        try:
            archive = self._run("archive", "--format=tar", commit)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()
            raise UserError(f"git does not give the files of {commit[:7]}: {reason}") from None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(folder, filter=_skip_outside)  # noqa: S202 - the filter is safe
            missing = []
            for path, md5 in output_files(self.lock_stages(commit)).items():
                target = folder / path
                if target.exists() or not is_result(Path(path)):
                    continue
                if (cached := self.cached(md5)) is None:
                    missing.append(path)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(cached)
            yield folder, missing

    def cached(self, md5: str) -> Path | None:
        """Return a file's path in DVC's cache; None if it is not there. Imports DVC.

        Raises:
            UserError: DVC's settings are invalid.
        """
        if self._cache is None:
            return None
        path = self._cache / md5[:2] / md5[2:]
        if path.is_file():
            return path
        self.missing_from_cache.add(path)
        return None

    @functools.cached_property
    def _cache(self) -> Path | None:
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.repo import Repo

        try:
            with Repo(str(self.root)) as repo:
                return Path(repo.cache.local.path)
        except NotDvcRepoError:
            return None
        except DvcException as error:
            raise UserError(f"DVC cannot be used in {self.root}: {error}") from None

    def _run(
        self, *arguments: str, folder: Path | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        # DVC's git hooks may have set these for another repository
        environment = {k: v for k, v in os.environ.items() if k not in GIT_HOOK_VARIABLES}
        return subprocess.run(  # noqa: S603
            ["git", *PLAIN_OUTPUT, *arguments],  # noqa: S607
            cwd=folder or self.root,
            capture_output=True,
            check=True,
            env=environment,
        )

    def _git(self, *arguments: str, folder: Path | None = None) -> str | None:
        """Return git's output; None if it fails or git is not installed."""
        try:
            return self._run(*arguments, folder=folder).stdout.decode(errors="replace")
        except (OSError, subprocess.CalledProcessError):
            return None


def _skip_outside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    try:
        return tarfile.data_filter(member, folder)
    except tarfile.FilterError:  # outside the folder, or a link to there: not a result
        return None


def is_result(path: Path) -> bool:
    """Whether an output of the pipeline is one of its results, not an intermediate file."""
    return path == TEST_SPLIT or path.parts[0] in (MODELS.name, REPORTS.name)
