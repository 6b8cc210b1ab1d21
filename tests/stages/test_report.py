import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from ruamel.yaml import YAML

from mnist_batchnorm.artifacts.predictions import read_confusion
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.parity import Check, Diagnosis
from mnist_batchnorm.reporting.figures import (
    confident_mistakes,
    paired_difference,
    reliability,
    wilson_interval,
)
from mnist_batchnorm.reporting.page import plain_text, report
from mnist_batchnorm.reporting.plots import png_uri
from mnist_batchnorm.reporting.results import read_results
from mnist_batchnorm.stages import report as stage
from mnist_batchnorm.stages.evaluate import calibration_error
from tests.conftest import ROOT, MnistBn
from tests.support.finished import MEASURED, finish, write_parity, write_seeds

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


@pytest.fixture(scope="module")
def run(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(ROOT / "params.yaml", folder)
    finish(folder, prepared, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report(read_results(), Path("reports"))
    return folder


@pytest.fixture
def finished(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "reports/index.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_command_writes_everything_and_says_what_it_found(
    finished: Path, mnist_bn: MnistBn
) -> None:
    before = {path.name: path.read_bytes() for path in outputs(finished)}
    assert set(before) == {f"{name}.svg" for name in PICTURES} | {"index.html", "model_card.md"}
    for path in outputs(finished):
        path.unlink()
    outcome = mnist_bn("report")
    assert outcome.status == 0
    assert "parity: proven" in outcome.out
    assert {path.name: path.read_bytes() for path in outputs(finished)} == before


def outputs(folder: Path) -> list[Path]:
    reports = folder / "reports"
    return [*(reports / "plots").iterdir(), reports / "index.html", reports / "model_card.md"]


def test_missing_input_is_the_callers_mistake(finished: Path, mnist_bn: MnistBn) -> None:
    (finished / "reports/parity.json").unlink()
    page = (finished / "reports/index.html").read_bytes()
    outcome = mnist_bn("report")
    assert outcome.status == 2
    assert "no reports/parity.json; run `dvc repro verify` first" in outcome.err
    assert (finished / "reports/index.html").read_bytes() == page


def test_outputs_hold_no_path_and_no_date(run: Path) -> None:
    for path in outputs(run):
        text = path.read_text()
        assert str(run) not in text
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


def test_pictures_take_the_pages_colours(page: Page) -> None:
    styles = " ".join(
        e.get("style", "") for tag, e in page.elements if tag in {"path", "text", "use"}
    )
    assert set(re.findall(r"#[0-9a-f]{6}", styles)) == set()
    assert {"var(--ink)", "var(--bn)", "var(--plain)", "var(--bad)"} <= set(
        re.findall(r"var\([^)]*\)", styles)
    )


def test_page_states_the_verdict_for_these_very_files(finished: Path, page: Page) -> None:
    parity = json.loads((finished / "reports/parity.json").read_text())
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


def test_page_and_card_show_the_metrics(run: Path, page: Page) -> None:
    card = (run / "reports/model_card.md").read_text()
    for variant in ("bn", "plain"):
        metrics = json.loads((run / f"reports/metrics/test-{variant}.json").read_text())
        _, per_class = read_confusion(run / f"reports/confusion/{variant}.csv")
        for text in (page.text.replace("\xa0", " "), card.replace("\xa0", " ")):
            assert f"{100 * metrics['accuracy']:.2f} %" in text
            assert f"{metrics['calibration_error']:.4f}" in text
            for accuracy in per_class.values():
                assert f"{100 * accuracy:.2f} %" in text
    assert "train.hidden 32, 32" in page.text
    assert "onnxruntime 1.32.0" in card


def test_page_and_card_show_the_figures_over_seeds(run: Path, page: Page) -> None:
    text = page.text.replace("\xa0", " ")
    assert "trained from seeds 0 to 1 as well. Those of one seed" in text
    assert "batch norm is ahead in 2 of 2." in text
    assert "batch norm 2 96.55 ± 0.07 96.50 96.60 plain 2 95.06 ± 0.08 95.00 95.12" in text
    assert "difference, in pairs 2 +1.49 ± 0.01 +1.48 +1.50 +1.36 to +1.62" in text
    assert "seeds trained on cpu" in text
    card = " ".join((run / "reports/model_card.md").read_text().split())
    assert (
        "Over seeds 0 to 1 (n = 2, mean ± sd) the accuracy in % is 96.55 ± 0.07 with batch norm "
        "and 95.06 ± 0.08 without; the difference, in pairs of the same seed, is +1.49 ± 0.01 "
        "points (95 % interval of the mean +1.36 to +1.62)." in card
    )


def test_page_of_many_seeds_where_plain_is_ahead(finished: Path) -> None:
    write_seeds(finished, count=32, epochs=1, gain=-0.001)
    report(read_results(), Path("reports"))
    html = (finished / "reports/index.html").read_text()
    assert len(html.encode()) < 700_000
    page = Page(html)
    assert "from seeds 0 to 31 as well" in page.text
    assert "batch norm is ahead in 0 of 32." in page.text
    text = page.text.replace("\N{MINUS SIGN}", "-")
    assert "difference, in pairs 32 -0.11 ± 0.01 -0.12 -0.10 -0.11 to -0.11" in text


HOSTILE = "<script>alert('x')</script> | `b` [a](https://example.org)"


@pytest.fixture(scope="module")
def troubled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The report of a run by the lecture's protocol whose ONNX file failed, with hostile words."""
    folder = tmp_path_factory.mktemp("troubled") / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "reports/plots")
    checks = [Check("file", "failed", HOSTILE), Check("probes", "not judged", "there is no graph")]
    likely = [Diagnosis("corrupt-file", HOSTILE), Diagnosis("opset", "opset 8")]
    write_parity(folder, checks, likely, summary={})
    path = folder / "reports/metrics/data.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"protocol": f"lecture: {HOSTILE}"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / "reports", CliRunner().invoke(stage.command)


def test_failed_parity_is_shown(troubled: tuple[Path, Result]) -> None:
    reports, result = troubled
    assert result.exit_code == 0  # the report's own work is done
    assert "parity: NOT PROVEN" in result.output
    page = Page((reports / "index.html").read_text())
    assert "Parity proven" not in page.text
    assert (
        f"✗ Parity NOT proven These files must not ship: not every check was made and passed. "
        f"bn.onnx , likely: {HOSTILE} bn.onnx, file : {HOSTILE} "
        f"bn.onnx , not judged: probes bn.onnx" in page.text
    )
    assert f"bn.onnx: NO parity Likely: {HOSTILE} Likely: opset 8 On 500 test images" in page.text
    assert f"file ✗ failed {HOSTILE} provenance" in page.text
    assert "probes ? not judged there is no graph invariance" in page.text
    card = (reports / "model_card.md").read_text()
    assert "**NOT PROVEN: do not ship these files**" in card
    assert "\n| bn.onnx | probes | **not judged** | there is no graph |\n" in card
    mistakes = [f"- Likely mistake in bn.onnx: {text}" for text in (plain_text(HOSTILE), "opset 8")]
    assert "\n" + "\n".join(mistakes) + "\n\n| file | check |" in card


def test_what_could_not_be_measured_is_said_and_not_drawn(troubled: tuple[Path, Result]) -> None:
    reports, _ = troubled
    page = Page((reports / "index.html").read_text())
    assert "Largest ONNX error, batch norm 7.5e-07" in page.text  # the other file's
    for fact in (
        "largest error, of the largest logit not measured",
        "largest error, in standard deviations of rounding not measured",
        "images whose class no rounding can change (worst case) not measured",
        "accuracy, ONNX Runtime not measured accuracy, PyTorch not measured",
    ):
        assert page.text.count(fact) == 1, fact
    drawn = {path.stem for path in (reports / "plots").iterdir()}
    assert drawn == PICTURES - {"parity-bn"}


def test_file_with_a_check_not_judged_is_unproven(finished: Path) -> None:
    write_parity(finished, [Check("weights", "not judged", "layer 2 is a GroupNorm")])
    report(read_results(), Path("reports"))
    page = Page((finished / "reports/index.html").read_text())
    assert "✗ Parity NOT proven" in page.text
    assert "bn.onnx: unproven On 500 test images" in page.text
    assert "bn-folded.onnx: parity On 500 test images" in page.text


def test_each_networks_largest_error_is_its_own(finished: Path) -> None:
    larger = MEASURED | {"max_relative_error": 2.5e-5, "worst_sigmas": 3.5}
    write_parity(finished, [], summary=larger, about="plain.onnx")
    report(read_results(), Path("reports"))
    page = Page((finished / "reports/index.html").read_text())
    assert (
        "Largest ONNX error, batch norm 7.5e-07 of the largest logit, plain 2.5e-05; "
        "in standard deviations of rounding: 3.5, alarm at 8" in page.text
    )


def test_plain_that_fails_is_shown(finished: Path) -> None:
    write_parity(finished, [Check("structure", "failed", "bn1 is additional")], about="plain.onnx")
    report(read_results(), Path("reports"))
    page = Page((finished / "reports/index.html").read_text())
    assert "✗ Parity NOT proven" in page.text
    assert "plain.onnx, structure : bn1 is additional" in page.text
    assert "bn.onnx: parity On 500 test images" in page.text
    card = (finished / "reports/model_card.md").read_text()
    assert "**NOT PROVEN: do not ship these files**" in card
    assert "\n| plain.onnx | structure | **FAILED** | bn1 is additional |\n" in card


def test_error_that_is_no_number_is_said_in_words(finished: Path) -> None:
    infinite = MEASURED | {"max_relative_error": 1e300, "worst_sigmas": 1e300}
    write_parity(finished, [Check("probes", "failed", "NaN")], summary=infinite)
    report(read_results(), Path("reports"))
    page = Page((finished / "reports/index.html").read_text())
    assert "Largest ONNX error, batch norm not finite of the largest logit" in page.text
    assert "in standard deviations of rounding not finite" in page.text


def test_hostile_text_stays_text(troubled: tuple[Path, Result]) -> None:
    reports, _ = troubled
    page = Page((reports / "index.html").read_text())
    assert page.all("script") == []
    # in the verdict the likely mistake and the check, in the section again, and the protocol
    assert page.text.count(HOSTILE) == 5
    card = (reports / "model_card.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| bn.onnx | file"))
    assert row == f"| bn.onnx | file | **FAILED** | {plain_text(HOSTILE)} |"
    assert f"Lecture's protocol: {plain_text(HOSTILE)}." in card


def test_lecture_protocol_labels_valid_as_the_test_images(troubled: tuple[Path, Result]) -> None:
    reports, _ = troubled
    for name in ("index.html", "plots/valid-loss.svg", "plots/curves.svg", "plots/seeds.svg"):
        assert "valid (= test images)" in (reports / name).read_text()
    assert "(= test images)" not in (reports / "plots/train-loss.svg").read_text()


def test_page_and_card_say_what_was_held_out(run: Path) -> None:
    valid = len(load_split(run / "data/prepared/valid.safetensors"))
    for name in ("index.html", "model_card.md"):
        text = (run / "reports" / name).read_text()
        assert f"Held out to watch training: {valid:,} training images." in text


def test_pictures_are_well_formed(run: Path) -> None:
    for name in PICTURES:
        text = (run / f"reports/plots/{name}.svg").read_text()
        assert ElementTree.fromstring(text).findtext("{http://www.w3.org/2000/svg}title")
        assert "<image" not in text


def test_card_begins_with_metadata_and_tells_how_to_load_the_model(finished: Path) -> None:
    card = (finished / "reports/model_card.md").read_text()
    _, front, _ = card.split("---\n", 2)
    metadata = YAML(typ="safe").load(front)
    metrics = json.loads((finished / "reports/metrics/test-bn.json").read_text())
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == metrics["accuracy"]
    assert metadata["license"] == "apache-2.0"
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, 10)
    assert names["digits"].shape == (1,)


def test_mistakes_are_the_most_confident_ones(finished: Path) -> None:
    found = read_results()
    mistakes = confident_mistakes(found)
    bn = found.networks["bn"]
    wrong = sorted(bn.probability[bn.predicted != found.test.labels], reverse=True)
    assert len(wrong) > stage.SHOWN_MISTAKES
    assert [m.probability for m in mistakes] == wrong[: stage.SHOWN_MISTAKES]
    for mistake in mistakes:
        assert mistake.actual == found.test.labels[mistake.index] != mistake.predicted


def test_page_without_mistakes_says_so(finished: Path) -> None:
    test = load_split(finished / "data/prepared/test.safetensors")
    rows = [f"{i},{label},{label},0.9" for i, label in enumerate(test.labels)]
    path = finished / "reports/predictions/bn.csv"
    path.write_text("\n".join(["index,actual,predicted,probability", *rows]) + "\n")
    pictures = {name: (finished / f"reports/plots/{name}.svg").read_text() for name in PICTURES}
    page = stage.render(read_results(), pictures)["index.html"]
    assert "It makes none on these test images." in Page(page).text


def test_picture_of_an_image_is_that_image_in_ink_on_paper() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    content = base64.b64decode(png_uri(image).partition("base64,")[2])
    shown = np.asarray(imread(io.BytesIO(content), format="png"))[..., :3]
    np.testing.assert_allclose(shown, np.repeat(1 - image[..., None] / 255, 3, axis=2), atol=0.01)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx([low, high], abs=5e-5)


def test_paired_difference_counts_discordant_images() -> None:
    bn = np.array([True] * 90 + [False] * 10)
    plain = np.array([True] * 70 + [False] * 20 + [True] * 5 + [False] * 5)
    found = paired_difference(bn, plain)
    assert (found.only_bn, found.only_plain) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    # variance of a mean of +1, 0 and -1: (25/100 - 0.15**2) / 100
    half = 1.959964 * ((0.25 - 0.0225) / 100) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.15 - half, 0.15 + half))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50),
    st.integers(1, 20),
)
def test_reliability_is_the_picture_of_the_calibration_error(
    images: list[tuple[float, bool]], bins: int
) -> None:
    probability, correct = np.array([p for p, _ in images]), np.array([c for _, c in images])
    found = reliability(probability, correct, bins)
    assert found.images.sum() == len(images)
    assert (found.interval[0] <= found.accuracy + 1e-12).all()
    assert (found.accuracy <= found.interval[1] + 1e-12).all()
    gaps = np.abs(found.confidence - found.accuracy) * found.images / len(images)
    assert gaps.sum() == pytest.approx(calibration_error(probability, correct, bins), abs=1e-12)


@given(st.text())
def test_plain_text_cannot_leave_its_table_cell(text: str) -> None:
    cell = plain_text(text)
    assert len(cell.splitlines()) <= 1
    assert re.search(r"(?<!\\)(?:\\\\)*[|<>`*\[\]]", cell) is None


def test_report_needs_no_torch() -> None:
    code = "import sys, mnist_batchnorm.stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
