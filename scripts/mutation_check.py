"""Break one line of a module at a time, in a copy of the tree: a test must fail each time.

    python -m scripts.mutation_check [MODULE ...]

Half an hour on two cores. Exit status: 0 every break fails a test, 1 one survives, 2 the table does
not fit the code or the tests fail unbroken.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("src/mnist_batchnorm")
TIMEOUT_S = 3000.0


@dataclass(frozen=True)
class Mutant:
    """A line of a module, found by its text without indentation, and what replaces it."""

    module: str
    line: str
    broken: str
    tests: str  # below tests/


MUTANTS = [
    Mutant(
        "parity/error_model.py",
        "active = (reach > 0).double()",
        "active = (reach < 0).double()",
        "parity/test_error_model.py",
    ),
    Mutant(
        "parity/weights.py",
        "if tensor.limit is None or np.any(np.abs(tensor.exact) > tensor.limit):",
        "if np.any(np.abs(tensor.exact) > np.inf):",
        "parity/test_mutants.py",
    ),
    Mutant(
        "parity/invariance.py",
        "[place for place, sigmas in apart.items() if sigmas > LIMIT_SIGMAS],",
        "[place for place, sigmas in apart.items() if sigmas > LIMIT_SIGMAS * 1e9],",
        "parity/test_invariance.py",
    ),
    Mutant(
        "network/frozen.py",
        "if updates.item() == 0:",
        "if updates.item() < 0:",
        "network/test_frozen.py",
    ),
    Mutant(
        "network/evaluation.py",
        "gaps = np.bincount(bin_of, weights=probability - correct, minlength=bins)",
        "gaps = np.bincount(bin_of, weights=probability, minlength=bins)",
        "network/test_evaluation.py",
    ),
    Mutant(
        "training/loop.py",
        "return order[: n - n % batch_size].view(-1, batch_size)",
        "return order[n % batch_size :].view(-1, batch_size)",
        "training/test_loop.py",
    ),
    Mutant(
        "training/fused.py",
        "self.momentum, self.eps = block.momentum, block.eps",
        "self.momentum, self.eps = block.momentum, 0.0",
        "training/test_fused.py",
    ),
    Mutant(
        "core/files.py",
        "temporary.replace(path)",
        "path.write_bytes(temporary.read_bytes())",
        "core/test_files.py",
    ),
    Mutant(
        "core/params.py",
        "batch_size: Annotated[int, Field(ge=2)]  # batch norm needs a variance",
        "batch_size: Annotated[int, Field(ge=1)]",
        "core/test_params.py",
    ),
    Mutant(
        "data/split.py",
        'quotas[np.argsort(-remainders, kind="stable")[: size - quotas.sum()]] += 1',
        'quotas[np.argsort(remainders, kind="stable")[: size - quotas.sum()]] += 1',
        "data/test_split.py",
    ),
    Mutant(
        "data/download.py",
        "if (actual := hashlib.sha256(content).hexdigest()) != expected:",
        "if (actual := hashlib.sha256(content).hexdigest())[:0] != expected[:0]:",
        "data/test_download.py",
    ),
    Mutant(
        "artifacts/splits.py",
        "flat /= np.float32(255)",
        "flat *= np.float32(1 / 255)",
        "artifacts/test_splits.py",
    ),
    Mutant(
        "artifacts/registry_file.py",
        "elif stack[-1:] != [event.version]:",
        "else:",
        "artifacts/test_registry_file.py",
    ),
    Mutant(
        "promotion/rules.py",
        'passed = all(number["p"] > alpha for number in numbers.values())',
        'passed = any(number["p"] > alpha for number in numbers.values())',
        "promotion/test_rules.py",
    ),
    Mutant(
        "serve/core/decode.py",
        "if type(classes) is not int or classes < 0:",
        "if type(classes) is not int:",
        "serve/core/test_decode.py",
    ),
    Mutant(
        "serve/core/encode.py",
        'ranked = np.argsort(-logits, axis=1, kind="stable")[:, :classes]',
        "ranked = np.argsort(-logits, axis=1)[:, ::-1][:, :classes]",
        "serve/core/test_encode.py",
    ),
    Mutant(
        "serve/http/origin_policy.py",
        'if b"origin" in headers and self._guarded and method not in READS:',
        'if b"origin" in headers and self._guarded and method in READS:',
        "serve/http/test_origin_policy.py",
    ),
    Mutant(
        "mlflow_sync/run_identity.py",
        '"params": self.train.model_dump(mode="json") | {"device": self.device},',
        '"params": self.train.model_dump(mode="json"),',
        "mlflow_sync/test_run_identity.py",
    ),
    Mutant(
        "signing/signer.py",
        "name for name in signed.keys() & found.keys() if signed[name] != found[name]",
        "name for name in signed.keys() & found.keys() if signed[name] == found[name]",
        "signing/test_signer.py",
    ),
    Mutant(
        "reporting/figures.py",
        'worst = wrong[np.argsort(-bn.probability[wrong], kind="stable")][:MAX_MISTAKES]',
        'worst = wrong[np.argsort(bn.probability[wrong], kind="stable")][:MAX_MISTAKES]',
        "reporting/test_figures.py",
    ),
]


def main() -> int:
    """Break the modules that are named, or all; print a table and return the exit status."""
    selected = [mutant for mutant in MUTANTS if mutant.module in sys.argv[1:] or not sys.argv[1:]]
    with copy_of_tree() as tree:
        if misfits := [mutant for mutant in selected if count(tree, mutant) != 1]:
            for mutant in misfits:
                print(f"{mutant.module}: {count(tree, mutant)} lines read {mutant.line!r}")
            return 2
        if failure := run_tests(tree, sorted({mutant.tests for mutant in selected})):
            print(f"the tests fail unbroken: {failure}")
            return 2
        survivors = 0
        for mutant in selected:
            started = time.monotonic()
            with broken(tree, mutant):
                failure = run_tests(tree, [mutant.tests])
            survivors += not failure
            seconds = time.monotonic() - started
            print(f"{mutant.module:28} {seconds:4.0f} s  {failure or 'SURVIVED'}", flush=True)
    print(f"{len(selected) - survivors} of {len(selected)} broken lines found")
    return 1 if survivors else 0


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    """Copy the files that git tracks or would track to a temporary folder."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():  # not deleted
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        yield tree


def count(tree: Path, mutant: Mutant) -> int:
    """Return how many lines of the module are the mutant's."""
    lines = (tree / SOURCE / mutant.module).read_text().splitlines()
    return [line.strip() for line in lines].count(mutant.line)


@contextmanager
def broken(tree: Path, mutant: Mutant) -> Iterator[None]:
    """Replace the mutant's line for the duration of the block."""
    path = tree / SOURCE / mutant.module
    text = path.read_text()
    path.write_text(text.replace(mutant.line, mutant.broken, 1))
    try:
        yield
    finally:
        path.write_text(text)


def run_tests(tree: Path, tests: Iterable[str]) -> str:
    """Run test files up to the first failure; return it, empty if all pass."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),  # before the editable install
        "PYTHONDONTWRITEBYTECODE": "1",  # bytecode of the same second and size would be taken
    }
    done = subprocess.run(
        [*pytest, *(f"tests/{name}" for name in tests)],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if not done.returncode:
        return ""
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0].split(" - ")[0] if failures else f"exit status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
