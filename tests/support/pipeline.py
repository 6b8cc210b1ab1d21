"""The whole project in a folder of its own, with real git, DVC and commands, offline."""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ruamel.yaml import YAML

from mnist_batchnorm.data.download import FILES
from tests.support import store

ROOT = Path(__file__).parents[2]
SLICE = ROOT / "tests/fixtures/mnist"
PATIENCE = 600.0  # seconds for a command, which may be a whole `dvc repro`; the machine may be busy
STORE = ("mlflow.db*", "mlartifacts")
PROJECT_FILES = (
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvc/plots",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "params.yaml",
    "src",
    "goldens/images.safetensors",
    "goldens/bn.json",
)


@dataclass(frozen=True)
class Project:
    """A copy of the project in a folder of its own, under git and DVC."""

    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)  # further variables

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a user's shell, with nothing of this machine's."""
        settings = self.folder.parent / "settings"
        scripts = Path(sys.executable).parent
        return {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(settings),
            "DVC_SITE_CACHE_DIR": str(settings),
            "PYTHONPATH": str(ROOT / "src"),  # this tree's code, whichever is installed
            "OMP_NUM_THREADS": "1",  # as tests/conftest.py
            "MNIST_SOURCE": str(SLICE),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
            **self.settings,
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment as a user would."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def check(self, *command: str) -> str:
        """Run a command that must succeed and return what it printed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def hashes(self, *patterns: str) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in patterns
            for path in sorted(self.folder.glob(pattern))
        }

    def set(self, **params: str) -> None:
        """Change parameters of stage train."""
        for name, value in params.items():
            path = self.folder / "params.yaml"
            head, _, section = path.read_text().partition("\ntrain:\n")
            section, count = re.subn(rf"(?m)^  {name}: \S+", f"  {name}: {value}", section, count=1)
            assert count == 1, f"no train.{name}"
            path.write_text(f"{head}\ntrain:\n{section}")

    def commit(self, message: str) -> str:
        """Commit everything and return the commit."""
        self.check("git", "add", "-A")
        self.check("git", "commit", "-qm", message)
        return self.check("git", "rev-parse", "HEAD").strip()

    def copy(self, folder: Path, *without: str) -> "Project":
        """Copy it to a new folder, as `mv` would; MLflow's database is told of its new place."""
        ignored = shutil.ignore_patterns(*without) if without else None
        shutil.copytree(self.folder, folder, symlinks=True, ignore=ignored)
        if (folder / "mlflow.db").exists():
            store.move_artifacts(folder / "mlflow.db", self.folder, folder)
        return replace(self, folder=folder)

    def clone(self, folder: Path) -> "Project":
        """Clone what is committed."""
        self.check("git", "clone", "-q", ".", str(folder))
        return replace(self, folder=folder)


def make_project(folder: Path, epochs: int = 3, seeds: int = 5) -> Project:
    """Copy the project as it is here, for the slice of MNIST, and commit it."""
    for name in PROJECT_FILES:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["download"]["sha256"] = {
        stem: hashlib.sha256(gzip.decompress((SLICE / f"{file}.gz").read_bytes())).hexdigest()
        for stem, file in FILES.items()
    }
    params["prepare"]["valid_size"] = 200
    params["train"]["epochs"] = epochs
    params["seeds"]["count"] = seeds
    yaml.dump(params, folder / "params.yaml")
    project = Project(folder)
    project.check("git", "init", "-q", "-b", "main")
    project.check("git", "add", "-A")
    project.check("git", "commit", "-qm", "start")
    return project
