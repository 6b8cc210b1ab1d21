"""What git and DVC remember of results: by commit, by experiment, whatever dvc.lock looks like."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import LOCK_FILE
from mnist_batchnorm.lineage.dvc_lock import md5_by_path, output_files, parse_stages
from mnist_batchnorm.lineage.git import Experiment, GitHistory, Provenance

WEIGHTS = "models/bn.safetensors"
GARBAGE = [
    "",
    "just text",
    "stages: [",
    "stages:\n- one\n",
    "stages:\n  train: 3\n",
    "stages:\n  train:\n    outs: 3\n    deps:\n    - 1\n    - path: a\n      etag: b\n",
    "<<<<<<< HEAD\nstages:\n=======\n>>>>>>> other\n",
    "\0\1\2",
]


def md5(content: str) -> str:
    return hashlib.md5(content.encode(), usedforsecurity=False).hexdigest()


def lock(weights: str, data: str = "data", seeds: str = "seeds", test: str = "test images") -> str:
    """The text of a dvc.lock, as DVC writes it, of files with these contents."""

    def entry(path: str, content: str) -> str:
        return f"    - path: {path}\n      hash: md5\n      md5: {md5(content)}\n      size: 1\n"

    train = f"    deps:\n{entry('data/prepared/train.safetensors', data)}    outs:\n"
    other = entry("data/prepared/test.safetensors", test)
    return (
        f"schema: '2.0'\nstages:\n  prepare:\n    cmd: p\n    outs:\n{other}"
        f"  train:\n    cmd: t\n{train}{entry(WEIGHTS, weights)}"
        f"  seeds:\n    cmd: s\n    outs:\n{entry('reports/metrics/seeds.json', seeds)}"
    )


class Repository:
    """A git repository with a project in its top folder, or in one within it."""

    def __init__(self, top: Path, within: str = "") -> None:
        self.top, self.folder = top, top / within
        self.time = 1_700_000_000
        self.folder.mkdir(parents=True)
        self.git("init", "-q", "-b", "main", str(top))

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env=os.environ | {"GIT_COMMITTER_DATE": f"{self.time} +0000"},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def write(self, text: str) -> None:
        (self.folder / "dvc.yaml").write_text("stages: {}\n")
        (self.folder / LOCK_FILE).write_text(text)

    def commit(self, text: str, message: str = "results") -> str:
        """Commit a dvc.lock."""
        self.write(text)
        self.time += 60
        self.git("add", "-A", str(self.top))
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def experiment(self, name: str, text: str) -> str:
        """Keep a dvc.lock as DVC does for an experiment on top of HEAD."""
        base = self.git("rev-parse", "HEAD")
        self.git("checkout", "-q", "--detach")
        commit = self.commit(text, f"dvc: commit experiment {name}")
        self.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", commit)
        self.git("checkout", "-q", "main")
        return commit

    @property
    def history(self) -> GitHistory:
        return GitHistory(self.folder)


Make = Callable[..., Repository]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a repository, with nothing of this machine's settings."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@localhost")
    return lambda within="": Repository(tmp_path / "repository", within)


@pytest.fixture(params=["", "a folder"])
def repository(make: Make, request: pytest.FixtureRequest) -> Repository:
    """An empty one with the project at its top, and in a folder."""
    return make(request.param)


# --- commits ------------------------------------------------------------------------------------


def test_result_is_its_oldest_commits(repository: Repository) -> None:
    first = repository.commit(lock("one"))
    second = repository.commit(lock("two", data="more"))
    third = repository.commit(lock("one"), "back again")
    history = repository.history
    assert history.head == third
    assert history.first_commit(md5("one")) == first
    assert history.first_commit(md5("two")) == second
    assert history.first_commit(md5("three")) is None
    deps = {"data/prepared/train.safetensors": md5("more")}
    assert history.provenance("train", md5("two")) == Provenance(second, True, (), deps)
    assert history.provenance("train", md5("three")) == Provenance(third)


def test_result_of_another_branch_or_tag_is_found(repository: Repository) -> None:
    repository.commit(lock("one"))
    repository.git("checkout", "-q", "-b", "side")
    side = repository.commit(lock("two"))
    repository.git("checkout", "-q", "--detach")
    tagged = repository.commit(lock("three"))
    repository.git("tag", "kept")
    repository.git("checkout", "-q", "main")
    assert repository.history.first_commit(md5("two")) == side
    assert repository.history.first_commit(md5("three")) == tagged


def merge(repository: Repository, text: str) -> tuple[str, str]:
    """Merge a branch, which is then deleted, into main with a dvc.lock; both had their own."""
    repository.commit(lock("start"))
    repository.git("checkout", "-q", "-b", "side")
    side = repository.commit(lock("side"))
    repository.git("checkout", "-q", "main")
    repository.commit(lock("main"))
    repository.git("merge", "-q", "-s", "ours", "--no-commit", "side")
    merged = repository.commit(text, "merge")
    repository.git("branch", "-q", "-D", "side")
    return side, merged


def newest(results: list[list[str]]) -> list[str]:
    """The newest commit with each set of results."""
    return [commits[0] for commits in results]


def test_result_that_a_merge_dropped_is_found(repository: Repository) -> None:
    side, _ = merge(repository, lock("main"))
    assert repository.history.first_commit(md5("side")) == side
    assert [side] in repository.history.commits_by_result([Path(WEIGHTS)])


def test_result_that_a_merge_made_is_the_merges(repository: Repository) -> None:
    side, merged = merge(repository, lock("made of both"))
    assert repository.history.first_commit(md5("made of both")) == merged
    assert repository.history.provenance("train", md5("made of both")).recorded
    assert len(repository.history.commits_by_result([Path(WEIGHTS)])) == 4
    assert repository.history.first_commit(md5("side")) == side


def test_results_are_each_ones_newest_commit(repository: Repository) -> None:
    repository.git("commit", "-q", "--allow-empty", "-m", "no results yet")
    repository.commit(lock("one"))
    second = repository.commit(lock("two"))
    seeds = repository.commit(lock("two", seeds="other seeds"))
    again = repository.commit(lock("one", data="one more"), "same weights")
    of = [Path(WEIGHTS), Path("reports/metrics/seeds.json")]
    assert newest(repository.history.commits_by_result(of)) == [second, seeds, again]


def test_commit_without_results_is_none(repository: Repository) -> None:
    report = repository.folder / "reports/page.html"
    report.parent.mkdir()
    report.write_text("a page")
    repository.commit("schema: '2.0'\n")
    first = repository.commit(lock("one"))
    assert newest(repository.history.commits_by_result([Path(WEIGHTS)])) == [first]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_in_one_commit_does_not_hide_the_others(make: Make, text: str) -> None:
    repository = make()
    garbage = repository.commit(text)
    first = repository.commit(lock("one"))
    history = repository.history
    assert newest(history.commits_by_result([Path(WEIGHTS)])) == [first]
    assert history.lock_stages(garbage).get("train", {}).keys() <= {"outs", "deps"}
    assert output_files(history.lock_stages(garbage)) == {}
    assert history.provenance("train", md5("one")).commit == first


def test_entries_that_are_none_are_left_out() -> None:
    stage = {"outs": [{"path": "a", "md5": "b"}, {"path": "c"}, {"md5": "d"}, 3, {"path": 1}]}
    assert md5_by_path(stage, "outs") == {"a": "b"}
    assert md5_by_path(stage, "deps") == {}
    assert parse_stages("stages: {train: {outs: []}, other: 3}") == {"train": {"outs": []}}


def test_settings_of_the_user_change_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = make()
    first = repository.commit(lock("one"))
    slower = repository.experiment("slower", lock("two"))
    config = tmp_path / "gitconfig"
    config.write_text("[color]\nui = always\n[log]\nshowSignature = true\ndecorate = full\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", "elsewhere")  # as in git's hooks
    monkeypatch.setenv("GIT_WORK_TREE", "elsewhere")
    assert repository.history.first_commit(md5("one")) == first
    assert repository.history.experiments_with(md5("two")) == [Experiment("slower", slower)]
    assert repository.history.describe(first) == f"{first[:7]} results"


@pytest.mark.usefixtures("make")  # for its settings
def test_folder_without_git_has_no_history(tmp_path: Path) -> None:
    history = GitHistory(tmp_path)
    assert history.head is None
    assert history.experiments == ()
    assert history.provenance("train", md5("one")) == Provenance()
    assert history.commits_by_result([Path(WEIGHTS)]) == []


def test_program_git_may_be_missing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = make()
    repository.commit(lock("one"))
    monkeypatch.setenv("PATH", "")
    assert repository.history.head is None
    assert repository.history.provenance("train", md5("one")) == Provenance()


# --- experiments --------------------------------------------------------------------------------


def test_result_of_experiments_is_the_newest_ones_until_it_is_committed(
    repository: Repository,
) -> None:
    start = repository.commit(lock("one"))
    older = repository.experiment("b-older", lock("two"))
    newer = repository.experiment("a-newer", lock("two"))
    repository.git("update-ref", "refs/exps/exec/EXEC_BRANCH", older)  # DVC's own
    repository.git("update-ref", "refs/exps/stash", newer)
    history = repository.history
    expected = [Experiment("b-older", older), Experiment("a-newer", newer)]
    assert history.experiments == tuple(expected)
    assert history.experiments_with(md5("two")) == expected
    made = history.provenance("train", md5("two"))
    assert made[:3] == (newer, True, ("a-newer", "b-older"))
    assert history.first_commit(md5("two")) is None
    assert history.provenance("train", md5("one")).commit == start
    committed = repository.commit(lock("two"))
    made = repository.history.provenance("train", md5("two"))
    assert (made.commit, made.experiments) == (committed, ("a-newer", "b-older"))


def test_experiments_of_one_name_on_two_commits_both_count(repository: Repository) -> None:
    repository.commit(lock("one"))
    first = repository.experiment("slower", lock("two"))
    repository.commit(lock("three"))
    second = repository.experiment("slower", lock("four"))
    history = repository.history
    assert {one.commit for one in history.experiments} == {first, second}
    assert history.experiments_with(md5("two")) == [Experiment("slower", first)]
    assert history.experiments_with(md5("four")) == [Experiment("slower", second)]
    assert {first, second} < set(newest(history.commits_by_result([Path(WEIGHTS)])))
    assert history.provenance("train", md5("two")).experiments == ("slower",)


def test_refs_change_with_commits_and_experiments(repository: Repository) -> None:
    repository.commit(lock("one"))
    seen = [repository.history.refs()]
    assert repository.history.refs() == seen[0]
    repository.experiment("slower", lock("two"))
    seen.append(repository.history.refs())
    repository.commit(lock("three"))
    seen.append(repository.history.refs())
    repository.git("tag", "kept")
    seen.append(repository.history.refs())
    repository.git("checkout", "-q", "--detach", "HEAD^")
    seen.append(repository.history.refs())
    assert len(set(seen)) == 5


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def under_dvc(repository: Repository) -> Repository:
    """The same with DVC, and one of two results in its cache."""
    configure(repository, "")
    (repository.folder / ".gitignore").write_text("/models\n/data\n")
    (repository.folder / "reports").mkdir()
    (repository.folder / "reports/page.html").write_text("a page")
    repository.commit(lock("one"))
    for content in ("one", "seeds", "data"):
        put(repository, content)
    return repository


def cache(repository: Repository, content: str) -> Path:
    name = md5(content)
    return repository.folder / ".dvc/cache/files/md5" / name[:2] / name[2:]


def configure(repository: Repository, text: str) -> None:
    """Make it DVC's, with a configuration; `dvc init` does no more, and takes seconds."""
    (repository.folder / ".dvc").mkdir(exist_ok=True)
    (repository.folder / ".dvc/config").write_text(text)


def put(repository: Repository, content: str) -> None:
    path = cache(repository, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_checkout_takes_files_from_git_and_from_the_cache(under_dvc: Repository) -> None:
    history = under_dvc.history
    assert history.head is not None
    (under_dvc.folder / "reports/page.html").write_text("edited since")
    with history.checkout(history.head) as (folder, missing):
        assert (folder / "reports/page.html").read_text() == "a page"
        assert (folder / WEIGHTS).read_text() == "one"
        assert (folder / "reports/metrics/seeds.json").read_text() == "seeds"
        assert not (folder / "data/prepared/train.safetensors").exists()  # on the way to results
        assert missing == ["data/prepared/test.safetensors"]
    assert not folder.exists()
    assert cache(under_dvc, "one").read_text() == "one"
    assert history.missing_from_cache == {cache(under_dvc, "test images")}


def test_cached_is_what_the_cache_holds(under_dvc: Repository) -> None:
    history = under_dvc.history
    assert history.cached(md5("one")) == cache(under_dvc, "one")
    assert history.cached(md5("two")) is None
    put(under_dvc, "two")
    assert history.cached(md5("two")) == cache(under_dvc, "two")


def test_cache_may_be_elsewhere(under_dvc: Repository, tmp_path: Path) -> None:
    elsewhere = tmp_path / "shared cache"
    shutil.move(under_dvc.folder / ".dvc/cache", elsewhere)
    configure(under_dvc, f"[cache]\n    dir = {elsewhere}\n")
    found = under_dvc.history.cached(md5("one"))
    assert found is not None
    assert found.is_relative_to(elsewhere)


def test_without_dvc_nothing_is_cached(make: Make) -> None:
    repository = make()
    head = repository.commit(lock("one"))
    assert repository.history.cached(md5("one")) is None
    with repository.history.checkout(head) as (folder, missing):
        assert (folder / LOCK_FILE).is_file()
        assert WEIGHTS in missing


def test_unusable_settings_of_dvc_are_an_error(make: Make) -> None:
    repository = make()
    configure(repository, "[core\n")
    with pytest.raises(UserError, match="DVC cannot be used in "):
        repository.history.cached(md5("one"))


def test_link_to_the_outside_is_left_out(make: Make) -> None:
    repository = make()
    (repository.folder / "data").symlink_to("/mnt/data")
    (repository.folder / "note").symlink_to("dvc.lock")
    head = repository.commit(lock("one"))
    with repository.history.checkout(head) as (folder, _):
        assert not (folder / "data").is_symlink()
        assert (folder / "note").read_text() == lock("one")


def test_commit_that_git_lacks_is_an_error(make: Make) -> None:
    repository = make()
    repository.commit(lock("one"))
    with (
        pytest.raises(UserError, match="git does not give the files of fffffff: "),
        repository.history.checkout("f" * 40),
    ):
        pass
