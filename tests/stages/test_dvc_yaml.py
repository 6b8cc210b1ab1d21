"""dvc.yaml depends on exactly the code that its stages import, and on the params they read."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mnist_batchnorm.cli import COMMANDS
from mnist_batchnorm.core.params import Params

ROOT = Path(__file__).parents[2]
PACKAGE = "mnist_batchnorm"
SOURCE = ROOT / "src" / PACKAGE
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
SECTIONS = {field.alias or name for name, field in Params.model_fields.items()}


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


def code_deps(stage: str) -> set[str]:
    deps = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    files = {dep for dep in deps if (ROOT / dep).is_file()}
    for folder in deps - files:
        # templates and other data that travel with a package count as its code
        files.update(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_exactly_what_it_imports(stage: str) -> None:
    assert code_deps(stage) == closure(f"{PACKAGE}.{stage}")


def test_package_init_has_no_code_to_depend_on() -> None:
    (docstring,) = ast.parse((SOURCE / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_a_command_of_the_same_name(stage: str) -> None:
    assert stage in COMMANDS
    assert STAGES[stage]["cmd"].split()[:2] == ["mnist-bn", stage]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_its_section_of_params(stage: str) -> None:
    declared = set(STAGES[stage].get("params", []))
    assert declared <= SECTIONS
    assert (stage in SECTIONS) == (stage in declared)


def test_every_section_of_params_belongs_to_a_stage() -> None:
    assert set(STAGES) >= SECTIONS
