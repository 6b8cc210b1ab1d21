"""The requests of docs/serving.md are answered as it shows."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import commands
from tests.support.serving import Server, lay, running

EXAMPLES = re.compile(r"```sh\n(?P<script>.*?)```\n+(?:```json\n(?P<answer>.*?)```)?", re.DOTALL)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("documented") / "pipeline"
    lay(folder)
    with running(folder=folder) as server:
        yield server


def test_the_documented_requests_are_answered_as_shown(documented: Server, tmp_path: Path) -> None:
    examples = list(EXAMPLES.finditer((ROOT / "docs/serving.md").read_text()))
    for example in examples:
        done = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input=example["script"].replace("http://127.0.0.1:8000", documented.url),
            cwd=tmp_path,
            env=commands.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert skeleton(done.stdout) == skeleton(example["answer"] or ""), example["script"]
    assert len(examples) >= 6


FLOAT32 = r"-?(?=(?:0\.0*)?(?:\d\.?){1,9}(?![\d.]))\d+\.\d+(?:e-?\d+)?"  # at most 9 digits count
FORMS = re.compile(rf'(?<=[\[,]){FLOAT32}(?=[],])|(?<="){FLOAT32}:\d(?=")')


def skeleton(answer: str) -> str:
    """An answer without what the network decides: versions, hashes, and numbers but their form."""
    answer = re.sub(r'"(\w*version|\w*sha256)":"[^"]*"', r'"\1":""', answer)
    answer = re.sub(r'"versions":\[[^]]*\]', '"versions":[]', answer)
    return FORMS.sub(lambda found: "1.5:1" if ":" in found[0] else "1.5", answer).replace("\n", "")


@pytest.mark.parametrize(
    ("data", "same"),
    [
        ("[-20.650566,0.012345678,1e-7]", False),
        ("[-20.650566,0.00123456789,3.0e-7]", True),
        ("[-20.650566192626953,8.25,0.5]", False),
        ("[8,8.25,0.5]", False),
        ("[8.25,0.5]", False),
        ('["8.25:1",0.5,0.5]', False),
    ],
)
def test_skeleton_keeps_the_form_of_numbers(data: str, same: bool) -> None:
    assert (skeleton(f'"data":{data}') == skeleton('"data":[1.25,-2.5,10.75]')) == same


@pytest.mark.parametrize(
    ("classes", "same"),
    [
        ('["8.271688:1","-2.212244:3"]', True),
        ('["8.271688192626953:1","-2.212244:3"]', False),
        ('["8.271688:1:3","-2.212244:3"]', False),
        ('["8.271688","-2.212244:3"]', False),
        ('["8.271688:1"]', False),
    ],
)
def test_skeleton_keeps_the_form_of_classes(classes: str, same: bool) -> None:
    assert (skeleton(f'"data":{classes}') == skeleton('"data":["0.5:0","1.5:9"]')) == same
