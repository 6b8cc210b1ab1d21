"""dvc.yaml depends on the code that its stages import, and on the params they read."""

import ast

import pytest
from ruamel.yaml import YAML

from mnist_batchnorm.cli import STAGES as COMMANDS
from mnist_batchnorm.core.params import Params
from tests.support.import_closure import PACKAGE, ROOT, SOURCE, closure

STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
SECTIONS = {field.alias or name for name, field in Params.model_fields.items()}
# The stages that take minutes list core/ and artifacts/ by file, so that a change in a schema that
# they do not use leaves their results valid. Others list folders, as a rerun costs seconds, and the
# same outputs rerun nothing after it.
BY_FILE = {"train": {"artifacts", "core"}, "seeds": {"artifacts", "core"}}
MOST_CODE_DEPS = 70


def required_code(stage: str) -> list[str]:
    """The code dependencies of a stage as dvc.yaml should list them."""
    listed_by_file = BY_FILE.get(stage, set()) | {"stages"}
    deps = set()
    for file in closure(f"{PACKAGE}.stages.{stage}"):
        path = (ROOT / file).relative_to(SOURCE)
        package = path.parts[0]
        if package not in listed_by_file:
            deps.add(package)
        elif path.name != "__init__.py":
            deps.add(str(path))
    return sorted(f"src/{PACKAGE}/{dep}" for dep in deps)


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_exactly_the_code_it_imports(stage: str) -> None:
    required = required_code(stage)
    listing = "".join(f"      - {dep}\n" for dep in required)
    assert sorted(code_deps(stage)) == required, f"dvc.yaml should list for {stage}\n{listing}"


def test_code_dependencies_are_few() -> None:
    assert sum(len(code_deps(stage)) for stage in STAGES) <= MOST_CODE_DEPS


@pytest.mark.parametrize("package", ["artifacts", "core", "stages"])
def test_init_of_a_package_that_is_listed_by_file_is_only_a_docstring(package: str) -> None:
    (docstring,) = ast.parse((SOURCE / package / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("changed", ["artifacts/registry_file.py", "serve/core/decode.py"])
def test_training_does_not_depend_on(changed: str) -> None:
    assert (SOURCE / changed).is_file()
    deps = [ROOT / dep for dep in code_deps("train")]
    assert not [dep for dep in deps if (SOURCE / changed).is_relative_to(dep)]


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_depends_on_tests(stage: str) -> None:
    assert not [dep for dep in STAGES[stage]["deps"] if dep.startswith("tests")]


def test_stages_are_the_commands_of_the_same_names() -> None:
    modules = {path.stem for path in (SOURCE / "stages").glob("*.py")} - {"__init__"}
    assert list(STAGES) == list(COMMANDS)
    assert modules == set(STAGES)
    for stage, definition in STAGES.items():
        assert definition["cmd"].split()[:2] == ["mnist-bn", stage]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_its_section_of_params(stage: str) -> None:
    declared = set(STAGES[stage].get("params", []))
    assert declared <= SECTIONS
    assert (stage in SECTIONS) == (stage in declared)


def test_every_section_of_params_belongs_to_a_stage() -> None:
    assert set(STAGES) >= SECTIONS
