"""The files of this project that importing a module can run."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "mnist_batchnorm"
SOURCE = ROOT / "src" / PACKAGE


def module_file(module: str) -> Path | None:
    path = SOURCE.parent / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == PACKAGE}


def closure(module: str) -> set[str]:
    """Every file of this project that importing the module can run, relative to the root."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        path = module_file(name)
        if path is None or str(path.relative_to(ROOT)) in seen:
            continue
        seen.add(str(path.relative_to(ROOT)))
        pending.extend(imports(path))
        pending.append(name.rpartition(".")[0])
    return seen - {f"src/{PACKAGE}/__init__.py"}
