"""What git and DVC remember: which commits and experiments hold a result, and its files.

A result is looked up by the MD5 that ``dvc.lock`` shows for one of its files.
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

EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(?P<name>[^/]+)")
GIT_HOOK = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")
# what a user's own settings would add to what git prints
PLAIN = ("-c", "color.ui=false", "-c", "log.showSignature=false")
PUBLISHED = ("--branches", "--tags", "--remotes")  # and HEAD: the commits that are not experiments
# as DVC writes it; to parse every commit's YAML would take minutes
MD5_IN_LOCK = re.compile(r"- path: (\S+)\n +hash: md5\n +md5: ([0-9a-f]{32})$", re.MULTILINE)


class Experiment(NamedTuple):
    """A DVC experiment; those on top of different commits may have one name."""

    name: str
    commit: str


class Made(NamedTuple):
    """Where a result is on record.

    Attributes:
        commit: the oldest commit that holds it, else the newest experiment that does, else the
            commit that it was made on top of; None without git.
        recorded: whether that commit holds it.
        experiments: the names of the DVC experiments that hold it, sorted.
        deps: MD5 of each dependency of its stage by path, as that commit's ``dvc.lock`` has them.
    """

    commit: str | None = None
    recorded: bool = False
    experiments: tuple[str, ...] = ()
    deps: Mapping[str, str] | None = None


class History:
    """The git repository around the project.

    Args:
        root: the folder of ``dvc.yaml`` in the repository, which need not be git's top folder.

    Attributes:
        lacking: where DVC's cache would have what was looked for in vain.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lacking: set[Path] = set()
        self._locks: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def head(self) -> str | None:
        """The commit checked out; None without git.

        A source archive that was unpacked inside another repository has none either.
        """
        found = self._git("rev-parse", "HEAD", f"HEAD:./{DVC_FILE}")
        return found.split()[0] if found else None

    @functools.cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """The DVC experiments, the oldest first."""
        form = "--format=%(objectname) %(refname)"
        listed = self._git("for-each-ref", "--sort=creatordate", form, "refs/exps") or ""
        lines = [line.partition(" ") for line in listed.splitlines() if self.head]
        return tuple(
            Experiment(match["name"], commit)
            for commit, _, name in lines
            if (match := EXPERIMENT.fullmatch(name))
        )

    def made(self, stage: str, md5: str) -> Made:
        """Find where the result of a stage with an out of this MD5 is on record."""
        commit, experiments = self.first_commit(md5), self.experiments_with(md5)
        if commit is None and experiments:
            commit = experiments[-1].commit
        if commit is None:
            return Made(self.head)
        deps = md5_of(self.lock(commit).get(stage, {}), "deps")
        return Made(commit, True, tuple(sorted({one.name for one in experiments})), deps)

    def first_commit(self, md5: str) -> str | None:
        """Return the oldest commit, experiments aside, whose ``dvc.lock`` names a file."""
        if self.head is None or self._shallow:
            return None
        found = self._git(
            # with what a merge dropped, and what it made itself
            *("log", "--full-history", "-m"),
            *("--reverse", "--topo-order", "--format=%H", f"-S{md5}"),
            *("HEAD", *PUBLISHED, "--", str(LOCK_FILE)),
        )
        return found.split()[0] if found else None

    @functools.cached_property
    def _shallow(self) -> bool:
        """Whether the clone lacks older commits, so that none can be called the first."""
        return (self._git("rev-parse", "--is-shallow-repository") or "").strip() == "true"

    def experiments_with(self, md5: str) -> list[Experiment]:
        """Return the experiments whose ``dvc.lock`` names a file, the oldest first."""
        if not self.experiments:
            return []
        commits = {one.commit for one in self.experiments}
        found = self._git("grep", "-F", "-l", md5, *commits, "--", str(LOCK_FILE)) or ""
        having = {line.partition(":")[0] for line in found.splitlines()}
        return [one for one in self.experiments if one.commit in having]

    def results(self, of: Sequence[Path]) -> list[list[str]]:
        """Return the commits and experiments with each distinct set of results, the newest first.

        Args:
            of: outs whose MD5 in ``dvc.lock`` tell one set from another.
        """
        if self.head is None:
            return []
        order = ("rev-list", "--full-history", "--reverse", "--topo-order")
        listed = self._git(*order, "HEAD", *PUBLISHED, "--", str(LOCK_FILE), str(REPORTS)) or ""
        found: dict[tuple[str | None, ...], list[str]] = {}
        for commit in [*listed.split(), *(one.commit for one in self.experiments)]:
            lock = self._git("show", f"{commit}:./{LOCK_FILE}") or ""
            md5 = dict(MD5_IN_LOCK.findall(lock))
            identity = tuple(md5.get(path.as_posix()) for path in of)
            if any(identity):
                found[identity] = [commit, *found.pop(identity, [])]
        return list(found.values())

    def lock(self, commit: str) -> dict[str, Any]:
        """Return the stages of the ``dvc.lock`` of a commit; empty where it is not usable."""
        if commit not in self._locks:  # to parse one takes a third of a second
            self._locks[commit] = stages_of(self._git("show", f"{commit}:./{LOCK_FILE}") or "")
        return self._locks[commit]

    def describe(self, commit: str) -> str:
        """Say for people which commit that is: short hash and subject."""
        return (self._git("log", "-1", "--format=%h %s", commit) or commit[:7]).strip()

    def holds(self, path: Path) -> bool:
        """Tell whether the commit checked out has a file."""
        return self._git("cat-file", "-e", f"HEAD:./{path.as_posix()}") is not None

    def refs(self) -> str:
        """Return what changes whenever a commit or an experiment comes or goes."""
        names = ("refs/heads", "refs/tags", "refs/remotes", "refs/exps")
        return f"{self.head}\n{self._git('for-each-ref', *names)}"

    def differs(self, paths: list[str]) -> bool:
        """Tell whether files in the current folder differ from its commit."""
        return self._git("status", "--porcelain", "--", *paths, folder=Path.cwd()) != ""

    @contextlib.contextmanager
    def checked_out(self, commit: str) -> Iterator[tuple[Path, list[str]]]:
        """Lay out the files of a commit's results in a temporary folder: git's, and DVC's.

        Yields:
            The folder, and the outs that are neither in git nor in DVC's cache.

        Raises:
            UserError: git does not give its files, as of a clone that is not whole.
        """
        try:
            archive = self._run("archive", "--format=tar", commit)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()
            raise UserError(f"git does not give the files of {commit[:7]}: {reason}") from None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(folder, filter=_inside)  # noqa: S202 - the filter is the cure
            missing = []
            for path, md5 in outs_of(self.lock(commit)).items():
                target = folder / path
                if target.exists() or not is_needed(Path(path)):
                    continue
                if (cached := self.cached(md5)) is None:
                    missing.append(path)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(cached)
            yield folder, missing

    def cached(self, md5: str) -> Path | None:
        """Return the place of a file in DVC's cache; None if it is not there."""
        if self._cache is None:
            return None
        path = self._cache / md5[:2] / md5[2:]
        if path.is_file():
            return path
        self.lacking.add(path)
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
        # DVC's hooks of git may have set these for another repository
        environment = {k: v for k, v in os.environ.items() if k not in GIT_HOOK}
        return subprocess.run(  # noqa: S603
            ["git", *PLAIN, *arguments],  # noqa: S607
            cwd=folder or self.root,
            capture_output=True,
            check=True,
            env=environment,
        )

    def _git(self, *arguments: str, folder: Path | None = None) -> str | None:
        """Return what git prints; None where it fails or there is no git."""
        try:
            return self._run(*arguments, folder=folder).stdout.decode(errors="replace")
        except (OSError, subprocess.CalledProcessError):
            return None


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Leave out what would be written, or point, outside: no result does."""
    try:
        return tarfile.data_filter(member, folder)
    except tarfile.FilterError:
        return None


def is_needed(path: Path) -> bool:
    """Tell whether an out of the pipeline is part of its results, not of their way."""
    return path == TEST_SPLIT or path.parts[0] in (MODELS.name, REPORTS.name)


def stages_of(lock: str) -> dict[str, Any]:
    """Parse the text of a ``dvc.lock``; empty where it is none."""
    from ruamel.yaml import YAML  # here: most that look into history need none
    from ruamel.yaml.error import YAMLError

    try:
        stages = YAML(typ="safe", pure=True).load(lock)["stages"]
    except (YAMLError, KeyError, TypeError):
        return {}
    if not isinstance(stages, dict):
        return {}
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


def outs_of(stages: dict[str, Any]) -> dict[str, str]:
    """Return the MD5 of every out in a ``dvc.lock`` by its path, folders aside."""
    return {
        path: md5
        for stage in stages.values()
        for path, md5 in md5_of(stage, "outs").items()
        if not md5.endswith(".dir")
    }


def md5_of(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the MD5 of each file of a stage in a ``dvc.lock``; what is none is left out.

    Args:
        stage: as the file has it, which anybody may have edited.
        kind: ``deps`` or ``outs``.
    """
    entries = stage.get(kind)
    return {
        entry["path"]: entry["md5"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("md5"), str)
    }
