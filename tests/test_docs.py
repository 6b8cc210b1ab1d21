"""What the documents say exists: commands, links, and the figures that the pipeline printed."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from dvc.cli.parser import get_main_parser
from ruamel.yaml import YAML

from mnist_batchnorm.cli import COMMANDS, cli
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.parity import Check, ParityReport

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    if path.name != "model_card.md"
)
README = (ROOT / "README.md").read_text()
GOALS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]

SHELL = re.compile(r"```(?:sh|bash|console)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")


def commands(text: str) -> list[str]:
    """Every command line in the text: lines of shell blocks, and inline code."""
    blocks = [line for block in SHELL.findall(text) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(line.split()) for line in [*blocks, *INLINE.findall(prose)]]


def starting_with(program: str) -> list[tuple[str, list[str]]]:
    """The documents' calls of a program: (document, its arguments)."""
    found = []
    for path in DOCUMENTS:
        for line in commands(path.read_text()):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose in code marks
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and words[0] == program and "…" not in line and "|" not in line:
                found.append((path.name, words[1:]))
    return found


@pytest.mark.parametrize(("document", "words"), starting_with("make"))
def test_make_goal_exists(document: str, words: list[str]) -> None:
    goals = {word for word in words if "=" not in word and not word.isupper()}
    assert goals <= GOALS, document


@pytest.mark.parametrize(("document", "words"), starting_with("mnist-bn"))
def test_command_exists(document: str, words: list[str]) -> None:
    name, *rest = words or ["--help"]
    if name.startswith(("-", "<")):
        return
    assert name in COMMANDS, document
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in rest if word.startswith("-")} <= options, document


@pytest.mark.parametrize(("document", "words"), starting_with("dvc"))
def test_dvc_understands(
    document: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        arguments = get_main_parser().parse_args(words)
    except SystemExit as error:  # argparse explains on stderr
        pytest.fail(f"{document}: dvc {' '.join(words)}: {error} {capsys.readouterr().err}")
    if getattr(arguments, "cmd", "") == "repro":
        names = {target.split("@")[0] for target in arguments.targets or []}
        assert names <= set(STAGES), document


def test_there_are_commands_to_check() -> None:
    assert len(starting_with("make")) > 3
    assert len(starting_with("mnist-bn")) > 3
    assert len(starting_with("dvc")) > 5


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_readme_shows_the_committed_figures() -> None:
    def metrics(name: str) -> dict[str, float]:
        content: dict[str, float] = json.loads((ROOT / f"reports/{name}.json").read_text())
        return content

    bn, plain = (metrics(f"metrics/test-{variant}")["accuracy"] for variant in ("bn", "plain"))
    assert f"| test accuracy of the pipeline's run | {bn:.4f} | {plain:.4f} |" in README
    graphs = json.loads((ROOT / "reports/parity.json").read_text())["graphs"]
    worst, differ = {"bn": 0.0, "plain": 0.0}, {"bn": 0, "plain": 0}
    for name, graph in graphs.items():
        variant, summary = GRAPHS[name].variant, graph["summary"]
        worst[variant] = max(worst[variant], summary["max_relative_error"])
        differ[variant] += summary["argmax_differences"]
    row = f"over the row's largest logit | {worst['bn']:.1e} | {worst['plain']:.1e} |"
    assert row in README
    assert f"differ from PyTorch's | {differ['bn']} | {differ['plain']} |" in README


def test_readme_shows_the_committed_verdict() -> None:
    parity = json.loads((ROOT / "reports/parity.json").read_text())
    graph = parity["graphs"]["bn.onnx"]
    checks = [Check(**check) for check in graph["checks"]]
    report = ParityReport(graph["onnx"]["path"], "", graph["weights"]["path"], "", checks, [])
    assert report.table() in README
