"""MLflow's pages as a person sees them, in Debian's Chromium: runs, curves, comparison, registry.

Also scripts/screenshots.py, which shows the same pages.
"""

import io
import math
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from scripts.browser import BrowserError, Window

from mnist_batchnorm.mlflow_sync.uri import charts_page
from scripts import browser, screenshots
from tests.support import commands, store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from playwright.sync_api import Browser, Locator

ROOT = Path(__file__).parents[2]
EPOCHS = 10
METRICS = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
ACCURACY = {"bn": 0.9713, "plain": 0.9566}

try:
    browser.find_chromium()
    missing = ""
except BrowserError as error:
    missing = str(error)
needs_chromium = pytest.mark.skipif(bool(missing), reason=missing)


@dataclass(frozen=True)
class Site:
    """A server, and what is in its store.

    Attributes:
        address: of the server.
        folder: of ``mlflow.db``.
        experiment: id of the training runs' experiment.
        charts: where its address leads that the pipeline prints last.
        runs: name of the training run by network.
    """

    address: str
    folder: Path
    experiment: str
    charts: str
    runs: Mapping[str, str]


def fill(folder: Path) -> tuple[str, str, dict[str, str]]:
    """Make ``mlflow.db`` as the pipeline does.

    The one place that knows how: `mnist-bn sync` can take over.

    Returns:
        Id of the experiment, where the learning curves are, name of the training run by network.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment: str = client.create_experiment(
        "mnist-batchnorm", artifact_location=(folder / "mlartifacts").as_uri()
    )
    seeds = log_run(client, experiment, "workspace/seeds", {}, {"dvc.stage": "seeds"})
    nested = {"dvc.stage": "seeds", "mlflow.parentRunId": seeds}
    names, ids = {}, {}
    for variant in ("plain", "bn"):
        log_run(client, experiment, f"workspace/seeds/{variant}-0", params(variant), nested)
        names[variant] = f"workspace/{variant}"
        ids[variant] = log_run(
            client, experiment, names[variant], params(variant), {"dvc.stage": "train"}
        )
    source = (folder / "mlartifacts/bn").as_uri()
    client.create_registered_model("mnist-bn")
    for alias in ("champion", "candidate"):  # versions 1 and 2
        version = client.create_model_version("mnist-bn", source, ids["bn"]).version
        client.set_registered_model_alias("mnist-bn", alias, version)
    return experiment, charts_page(experiment), names


def params(variant: str) -> dict[str, object]:
    """Some of what a run is made with."""
    return {
        "variant": variant,
        "batch_norm": "true" if variant == "bn" else "false",
        "prepare.seed": 0,
        "train.epochs": EPOCHS,
        "train.lr": 0.01,
        "train.seed": 2,
    }


def log_run(
    client: "MlflowClient",
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> str:
    """Log a run, with a curve where it is a training run, and return its id."""
    from mlflow.entities import Metric, Param, RunTag

    run_id: str = client.create_run(experiment, run_name=name).info.run_id
    metrics = []
    if tags["dvc.stage"] == "train":
        scale = 1.0 if params["variant"] == "bn" else 2.0
        metrics.append(Metric("test/accuracy", ACCURACY[str(params["variant"])], 0, 0))
        for epoch in range(1, EPOCHS + 1):
            loss = scale * (0.1 + 0.1 / epoch + 0.02 * math.sin(3 * epoch))
            values = {"loss": loss, "accuracy": 1 - loss / 4}
            metrics += [
                Metric(f"curves/{name}", values[name.rpartition("_")[2]], epoch, epoch)
                for name in METRICS
            ]
    client.log_batch(
        run_id,
        metrics,
        [Param(key, str(value)) for key, value in params.items()],
        [RunTag(*tag) for tag in tags.items()],
    )
    client.set_terminated(run_id)
    return run_id


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        store.use_settings(patch)
        # MLflow colours a run by its id, and two ids in some twenty get the same colour
        chance = random.Random(0)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=chance.getrandbits(128), version=4))
        made = fill(folder)
    with browser.serving(f"sqlite:///{folder / 'mlflow.db'}", folder) as address:
        assert len(servers(address)) > 1  # it has a worker
        yield Site(address, folder, *made)
    assert not servers(address)


def servers(address: str) -> list[str]:
    """Command lines of MLflow's processes that serve at an address."""
    port, found = address.rpartition(":")[2], []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if "mlflow" in line and f" --port {port} " in line:
            found.append(line)
    return found


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    with browser.browser() as chromium:
        yield chromium


@pytest.fixture
def window(site: Site, chromium: "Browser") -> Iterator[Window]:
    """A window that is content with what the server has, and sees no error."""
    with browser.window(chromium, site.address, 1280, 900) as window:
        yield window
        assert window.errors == []
        assert window.outside == []


def see(locator: "Locator") -> str:
    """Wait until something can be seen and return its text."""
    locator.wait_for()
    return locator.inner_text()


@needs_chromium
def test_one_finds_both_runs_from_the_front_page(site: Site, window: Window) -> None:
    window.open("")
    window.page.get_by_role("button", name="Model training").click()
    window.page.get_by_role("link", name="mnist-batchnorm").first.click()
    for run in site.runs.values():
        see(window.page.get_by_role("link", name=run, exact=True))
    see(window.page.get_by_role("link", name="workspace/seeds", exact=True))


@needs_chromium
def test_each_measure_has_a_chart_with_both_curves(site: Site, window: Window) -> None:
    page, runs = window.page, site.runs.values()
    window.open(site.charts)
    colours = set()
    for run in runs:
        cell = page.get_by_role("gridcell").filter(has=page.get_by_role("link", name=run))
        see(cell)
        found = re.search("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", cell.text_content() or "")
        assert found, "the table gives no colour"
        colours.add("rgb({}, {}, {})".format(*(int(part, 16) for part in found.groups())))
    assert len(colours) == 2
    for metric in METRICS:
        lines = window.lines(f"curves/{metric}", list(runs))
        assert lines == dict.fromkeys(colours, EPOCHS), metric
    # the seeds stay out
    assert page.get_by_role("link", name="workspace/").count() == len(runs)


@needs_chromium
def test_a_comparison_shows_what_differs_and_leads_to_the_curves(
    site: Site, window: Window
) -> None:
    page = window.page
    window.open(site.charts)
    for run in site.runs.values():
        see(page.get_by_role("link", name=run, exact=True))
    page.get_by_role("checkbox", name="Select all runs").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    see(page.get_by_role("heading", name="Comparing 2 Runs"))

    shown = {}
    same = page.get_by_role("rowheader", name="train.lr", exact=True)
    see(same)
    page.get_by_role("switch", name="Parameters - Show diff only").check()
    same.wait_for(state="hidden")
    for name in ("Run Name:", "batch_norm", "variant"):
        header = page.get_by_role("rowheader", name=name, exact=True)
        row = page.get_by_role("row").filter(has=header)
        see(row)
        shown[name] = set(row.get_by_role("cell").all_inner_texts())
    assert shown == {
        "Run Name:": set(site.runs.values()),
        "batch_norm": {"true", "false"},
        "variant": {"bn", "plain"},
    }
    for other in params("bn").keys() - shown.keys():
        assert not page.get_by_role("rowheader", name=other, exact=True).is_visible(), other

    links = [page.get_by_role("link", name=f"curves/{metric}", exact=True) for metric in METRICS]
    places = [link.get_attribute("href") for link in links]
    for metric, place in zip(METRICS, places, strict=True):
        window.open(str(place))
        lines = window.lines(f"curves/{metric}", list(site.runs.values()))
        assert list(lines.values()) == [EPOCHS, EPOCHS], metric


@needs_chromium
def test_the_registry_shows_the_champion(window: Window) -> None:
    window.open(browser.registered("mnist-bn"))
    see(window.page.get_by_role("heading", name="mnist-bn", exact=True))
    for alias in ("champion", "candidate"):
        row = window.page.get_by_role("row").filter(has_text=f"@ {alias}")
        assert re.search(r"Version \d", see(row))


@needs_chromium
def test_a_window_notices_errors_and_reaches_nothing_else(site: Site, chromium: "Browser") -> None:
    with browser.window(chromium, site.address, 400, 300) as window:
        window.open("health")
        with window.page.expect_event("pageerror"):
            window.page.evaluate("() => { setTimeout(() => { throw new Error('oh no') }) }")
        assert (
            window.page.evaluate("fetch('http://example.org/').catch(() => 'refused')") == "refused"
        )
        assert window.errors == ["oh no"]
        assert window.outside == ["http://example.org/"]


@needs_chromium
@pytest.mark.parametrize("name", screenshots.PICTURES)
def test_a_picture_is_small(site: Site, chromium: "Browser", name: str) -> None:
    shown = screenshots.find(f"sqlite:///{site.folder / 'mlflow.db'}")
    assert list(shown.runs.values()) == ["workspace/bn", "workspace/plain"]
    assert shown.only
    png = screenshots.picture(chromium, site.address, name, shown)
    assert 5_000 < len(png) < 80_000
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert 700 < image.width <= 1280
        assert len(image.getcolors() or ()) > 50


@needs_chromium
@pytest.mark.slow
def test_pictures_are_written_to_the_docs(site: Site, tmp_path: Path) -> None:
    shutil.copy(site.folder / "mlflow.db", tmp_path)
    command = (sys.executable, "-m", "scripts.screenshots", "--root", str(tmp_path))
    status, err = commands.run(ROOT, *command)
    assert (status, err) == (0, "")
    written = sorted(path.stem for path in (tmp_path / "docs/images").iterdir())
    assert written == sorted(screenshots.PICTURES)


@pytest.fixture
def complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """Run the command line where it cannot succeed and return the last that it says."""
    store.use_settings(monkeypatch)  # which it changes for its process
    monkeypatch.setattr(sys, "argv", ["screenshots", "--root", str(tmp_path)])

    def complain() -> str:
        assert screenshots.main() == 2
        assert not (tmp_path / "docs").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return complain


@needs_chromium
def test_pictures_need_runs(tmp_path: Path, complaint: Callable[[], str]) -> None:
    assert complaint() == "error: no mlflow.db; run `dvc repro` first"
    (tmp_path / "mlflow.db").write_bytes(store.empty_database())
    assert complaint() == (
        "error: mlflow.db has no experiment mnist-batchnorm; run `dvc repro` first"
    )
    client = store.client(tmp_path)
    experiment = client.create_experiment("mnist-batchnorm", artifact_location="/nowhere")
    for variant in ("bn", "plain"):
        assert complaint() == (
            f"error: mlflow.db has no training run of {variant}; run `dvc repro` first"
        )
        log_run(client, experiment, variant, params(variant), {"dvc.stage": "train"})
    assert complaint() == "error: mlflow.db has no model mnist-bn@champion; run `dvc repro` first"


def test_pictures_need_a_browser(
    complaint: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    assert complaint() == "error: playwright is not installed: make setup"
    monkeypatch.setitem(sys.modules, "playwright.sync_api", ModuleType("playwright.sync_api"))
    monkeypatch.setattr(browser, "CHROMIUM", ())
    assert complaint() == "error: Chromium is not installed: apt-get install chromium"


def test_a_server_that_does_not_start_is_tried_on_other_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"; echo "address already in use"; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with (
        pytest.raises(BrowserError, match=r"does not start:\n(.*\n)*address already") as refused,
        browser.serving("sqlite:///mlflow.db", tmp_path),
    ):
        pass
    assert len(set(re.findall(r"--port (\d+)", str(refused.value)))) == 3


def test_a_server_that_does_not_answer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(browser, "PATIENCE", 0.2)
    started = time.monotonic()
    with (
        pytest.raises(BrowserError, match="mlflow ui does not answer within"),
        browser.serving("sqlite:///mlflow.db", tmp_path),
    ):
        pass
    assert time.monotonic() - started < 30
