"""The HTML page and the model card say what was measured, are self-contained and accessible."""

import contextlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mnist_batchnorm.artifacts.predictions import read_confusion
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.parity import Check, Diagnosis
from mnist_batchnorm.reporting.page import escape_markdown, render, write_report
from mnist_batchnorm.reporting.plots.curves import seeds
from mnist_batchnorm.reporting.results import read_results
from tests.conftest import ROOT
from tests.support.finished import MEASURED, write_parity, write_seeds

LINKS = {"https://arxiv.org/abs/1502.03167", "https://arxiv.org/abs/1706.04599"}
PICTURES = {
    "train-loss",
    "train-accuracy",
    "valid-loss",
    "valid-accuracy",
    "curves",
    "seeds",
    "confusion-bn",
    "confusion-plain",
    "calibration",
    "statistics-arriving",
    "statistics-leaving",
    "parity-bn",
    "parity-bn-folded",
    "parity-plain",
}


class Page(HTMLParser):
    """A parsed page: its elements, its text, and whether every element is closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def pictures_of(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (folder / "reports/plots").iterdir()}


@pytest.fixture
def render_again(finished: Path, reported: Path) -> Callable[[], tuple[Page, str]]:
    """Render the page and the card of the changed run, with the unchanged run's pictures."""

    def render_again() -> tuple[Page, str]:
        texts = render(read_results(), pictures_of(reported))
        return Page(texts["index.html"]), texts["model_card.md"]

    assert finished == Path.cwd()
    return render_again


@pytest.fixture(scope="module")
def html(reported: Path) -> str:
    return (reported / "reports/index.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def outputs(folder: Path) -> list[Path]:
    reports = folder / "reports"
    return [*(reports / "plots").iterdir(), reports / "index.html", reports / "model_card.md"]


def test_outputs_hold_no_path_and_no_date(reported: Path) -> None:
    for path in outputs(reported):
        text = path.read_text()
        assert str(reported) not in text
        assert str(ROOT) not in text
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text), path


def test_page_is_self_contained_and_small(html: str, page: Page) -> None:
    assert len(html.encode()) < 600_000
    assert page.all("script") == []
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        for name in ("href", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:")) or target in LINKS
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none';")


def test_page_refers_to_ids_that_exist_once(html: str, page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert ids.most_common(1)[0][1] == 1
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', html)
    assert {name for names in targets for name in names if name} <= set(ids)


def test_page_is_accessible(page: Page) -> None:
    tags = Counter(tag for tag, _ in page.elements)
    assert page.all("html")[0]["lang"] == "en"
    assert [tags[tag] for tag in ("h1", "header", "main", "nav", "footer")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" for svg in page.all("svg"))
    assert tags["svg"] == len(PICTURES - {"curves", "confusion-bn", "confusion-plain"})
    assert tags["title"] == 1 + tags["svg"]  # each picture is named
    assert all("scope" in header for header in page.all("th"))
    assert all("aria-label" in e for tag, e in page.elements if e.get("role") == "region")


def test_pictures_take_the_pages_colors(page: Page) -> None:
    styles = " ".join(
        e.get("style", "") for tag, e in page.elements if tag in {"path", "text", "use"}
    )
    assert set(re.findall(r"#[0-9a-f]{6}", styles)) == set()
    assert {"var(--ink)", "var(--bn)", "var(--plain)", "var(--bad)"} <= set(
        re.findall(r"var\([^)]*\)", styles)
    )


def test_page_states_the_verdict_for_these_very_files(reported: Path, page: Page) -> None:
    parity = json.loads((reported / "reports/parity.json").read_text())
    verdict = page.text.index("✓ Parity proven")
    for graph in parity["graphs"].values():
        assert 0 < page.text.index(graph["onnx"]["sha256"]) - verdict < 500
        for check in graph["checks"]:
            assert check["detail"] in page.text
    for absent in ("NOT", "not judged", "failed", "ikely"):
        assert absent not in page.text


def test_page_states_how_large_the_errors_are(page: Page) -> None:
    assert (
        "Largest ONNX error, batch norm 7.5e-07 of the largest logit, plain 7.5e-07; "
        "in standard deviations of rounding: 3.04, alarm at 8" in page.text
    )
    for fact in (
        "On 500 test images, at every optimization level",
        "largest error, of the largest logit 7.5e-07",
        "largest error, in standard deviations of rounding 3.04",
        "alarm, in standard deviations of rounding 8",
        "alarm, of the largest logit, median image 1.9e-06",
        "images whose class no rounding can change (worst case) 499",
        "images too close to call 1",
        "predictions that differ from float64 0",
        "accuracy, ONNX Runtime 84.00 % accuracy, PyTorch 84.00 % accuracy, float64 84.00 %",
    ):
        assert page.text.count(fact) == 3, fact


def test_page_and_card_show_the_metrics(reported: Path, page: Page) -> None:
    card = (reported / "reports/model_card.md").read_text()
    for variant in ("bn", "plain"):
        metrics = json.loads((reported / f"reports/metrics/test-{variant}.json").read_text())
        with contextlib.chdir(reported):
            _, per_class = read_confusion(variant)
        for text in (page.text.replace("\xa0", " "), card.replace("\xa0", " ")):
            assert f"{100 * metrics['accuracy']:.2f} %" in text
            assert f"{metrics['calibration_error']:.4f}" in text
            for accuracy in per_class.values():
                assert f"{100 * accuracy:.2f} %" in text
    assert "train.hidden 32, 32" in page.text
    assert "onnxruntime 1.32.0" in card


def test_page_and_card_show_the_figures_over_seeds(reported: Path, page: Page) -> None:
    text = page.text.replace("\xa0", " ")
    assert "trained from seeds 0 to 1 as well. Those of one seed" in text
    assert "batch norm is ahead in 2 of 2." in text
    assert "batch norm 2 96.55 ± 0.07 96.50 96.60 plain 2 95.06 ± 0.08 95.00 95.12" in text
    assert "difference, in pairs 2 +1.49 ± 0.01 +1.48 +1.50 +1.36 to +1.62" in text
    assert "seeds trained on cpu" in text
    card = " ".join((reported / "reports/model_card.md").read_text().split())
    assert (
        "Over seeds 0 to 1 (n = 2, mean ± sd) the accuracy in % is 96.55 ± 0.07 with batch norm "
        "and 95.06 ± 0.08 without; the difference, in pairs of the same seed, is +1.49 ± 0.01 "
        "points (95 % interval of the mean +1.36 to +1.62)." in card
    )


def test_page_of_many_seeds_where_plain_is_ahead(finished: Path, reported: Path) -> None:
    write_seeds(finished, count=32, epochs=1, gain=-0.001)
    results = read_results()
    pictures = pictures_of(reported) | {"seeds": seeds(results.seeds, "valid")}
    html = render(results, pictures)["index.html"]
    assert len(html.encode()) < 700_000
    page = Page(html)
    assert "from seeds 0 to 31 as well" in page.text
    assert "batch norm is ahead in 0 of 32." in page.text
    text = page.text.replace("\N{MINUS SIGN}", "-")
    assert "difference, in pairs 32 -0.11 ± 0.01 -0.12 -0.10 -0.11 to -0.11" in text


HOSTILE = "<script>alert('x')</script> | `b` [a](https://example.org)"


@pytest.fixture(scope="module")
def troubled(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run by the lecture's protocol whose ONNX file failed, with hostile words."""
    folder = tmp_path_factory.mktemp("troubled") / "run"
    shutil.copytree(reported, folder)
    shutil.rmtree(folder / "reports/plots")
    checks = [Check("file", "failed", HOSTILE), Check("probes", "not judged", "there is no graph")]
    likely = [Diagnosis("corrupt-file", HOSTILE), Diagnosis("opset", "opset 8")]
    write_parity(folder, checks, likely, summary={})
    path = folder / "reports/metrics/data.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"protocol": f"lecture: {HOSTILE}"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_report(read_results(), Path("reports"))
    return folder / "reports"


def test_failed_parity_is_shown(troubled: Path) -> None:
    page = Page((troubled / "index.html").read_text())
    assert "Parity proven" not in page.text
    assert (
        f"✗ Parity NOT proven These files must not ship: not every check was made and passed. "
        f"bn.onnx , likely: {HOSTILE} bn.onnx, file : {HOSTILE} "
        f"bn.onnx , not judged: probes bn.onnx" in page.text
    )
    assert f"bn.onnx: NO parity Likely: {HOSTILE} Likely: opset 8 On 500 test images" in page.text
    assert f"file ✗ failed {HOSTILE} provenance" in page.text
    assert "probes ? not judged there is no graph invariance" in page.text
    card = (troubled / "model_card.md").read_text()
    assert "**NOT PROVEN: do not ship these files**" in card
    assert "\n| bn.onnx | probes | **not judged** | there is no graph |\n" in card
    mistakes = [
        f"- Likely mistake in bn.onnx: {text}" for text in (escape_markdown(HOSTILE), "opset 8")
    ]
    assert "\n" + "\n".join(mistakes) + "\n\n| file | check |" in card


def test_what_could_not_be_measured_is_said_and_not_drawn(troubled: Path) -> None:
    page = Page((troubled / "index.html").read_text())
    assert "Largest ONNX error, batch norm 7.5e-07" in page.text  # the other file's
    for fact in (
        "largest error, of the largest logit not measured",
        "largest error, in standard deviations of rounding not measured",
        "images whose class no rounding can change (worst case) not measured",
        "accuracy, ONNX Runtime not measured accuracy, PyTorch not measured",
    ):
        assert page.text.count(fact) == 1, fact
    drawn = {path.stem for path in (troubled / "plots").iterdir()}
    assert drawn == PICTURES - {"parity-bn"}


def test_file_with_a_check_not_judged_is_unproven(
    finished: Path, render_again: Callable[[], tuple[Page, str]]
) -> None:
    write_parity(finished, [Check("weights", "not judged", "layer 2 is a GroupNorm")])
    page, _ = render_again()
    assert "✗ Parity NOT proven" in page.text
    assert "bn.onnx: unproven On 500 test images" in page.text
    assert "bn-folded.onnx: parity On 500 test images" in page.text


def test_each_networks_largest_error_is_its_own(
    finished: Path, render_again: Callable[[], tuple[Page, str]]
) -> None:
    larger = MEASURED | {"max_relative_error": 2.5e-5, "worst_sigmas": 3.5}
    write_parity(finished, [], summary=larger, about="plain.onnx")
    page, _ = render_again()
    assert (
        "Largest ONNX error, batch norm 7.5e-07 of the largest logit, plain 2.5e-05; "
        "in standard deviations of rounding: 3.5, alarm at 8" in page.text
    )


def test_plain_that_fails_is_shown(
    finished: Path, render_again: Callable[[], tuple[Page, str]]
) -> None:
    write_parity(finished, [Check("structure", "failed", "bn1 is additional")], about="plain.onnx")
    page, card = render_again()
    assert "✗ Parity NOT proven" in page.text
    assert "plain.onnx, structure : bn1 is additional" in page.text
    assert "bn.onnx: parity On 500 test images" in page.text
    assert "**NOT PROVEN: do not ship these files**" in card
    assert "\n| plain.onnx | structure | **FAILED** | bn1 is additional |\n" in card


def test_error_that_is_no_number_is_said_in_words(
    finished: Path, render_again: Callable[[], tuple[Page, str]]
) -> None:
    infinite = MEASURED | {"max_relative_error": 1e300, "worst_sigmas": 1e300}
    write_parity(finished, [Check("probes", "failed", "NaN")], summary=infinite)
    page, _ = render_again()
    assert "Largest ONNX error, batch norm not finite of the largest logit" in page.text
    assert "in standard deviations of rounding not finite" in page.text


def test_hostile_text_stays_text(troubled: Path) -> None:
    page = Page((troubled / "index.html").read_text())
    assert page.all("script") == []
    # in the verdict the likely mistake and the check, in the section again, and the protocol
    assert page.text.count(HOSTILE) == 5
    card = (troubled / "model_card.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| bn.onnx | file"))
    assert row == f"| bn.onnx | file | **FAILED** | {escape_markdown(HOSTILE)} |"
    assert f"Lecture's protocol: {escape_markdown(HOSTILE)}." in card


def test_lecture_protocol_labels_valid_as_the_test_images(troubled: Path) -> None:
    for name in ("index.html", "plots/valid-loss.svg", "plots/curves.svg", "plots/seeds.svg"):
        assert "valid (= test images)" in (troubled / name).read_text()
    assert "(= test images)" not in (troubled / "plots/train-loss.svg").read_text()


def test_page_and_card_say_what_was_held_out(reported: Path) -> None:
    valid = len(load_split(reported / "data/prepared/valid.safetensors"))
    for name in ("index.html", "model_card.md"):
        text = (reported / "reports" / name).read_text()
        assert f"Held out to watch training: {valid:,} training images." in text


def test_pictures_are_well_formed(reported: Path) -> None:
    for name in PICTURES:
        text = (reported / f"reports/plots/{name}.svg").read_text()
        assert ElementTree.fromstring(text).findtext("{http://www.w3.org/2000/svg}title")
        assert "<image" not in text


def test_card_begins_with_metadata_and_tells_how_to_load_the_model(
    reported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reported)
    card = (reported / "reports/model_card.md").read_text()
    _, front, _ = card.split("---\n", 2)
    metadata = YAML(typ="safe").load(front)
    metrics = json.loads((reported / "reports/metrics/test-bn.json").read_text())
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == metrics["accuracy"]
    assert metadata["license"] == "apache-2.0"
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, 10)
    assert names["digits"].shape == (1,)


def test_page_without_mistakes_says_so(
    finished: Path, render_again: Callable[[], tuple[Page, str]]
) -> None:
    test = load_split(finished / "data/prepared/test.safetensors")
    rows = [f"{i},{label},{label},0.9" for i, label in enumerate(test.labels)]
    path = finished / "reports/predictions/bn.csv"
    path.write_text("\n".join(["index,actual,predicted,probability", *rows]) + "\n")
    page, _ = render_again()
    assert "It makes none on these test images." in page.text


@given(st.text())
def test_plain_text_cannot_leave_its_table_cell(text: str) -> None:
    cell = escape_markdown(text)
    assert len(cell.splitlines()) <= 1
    assert re.search(r"(?<!\\)(?:\\\\)*[|<>`*\[\]]", cell) is None
