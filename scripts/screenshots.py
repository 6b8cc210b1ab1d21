"""Take pictures of MLflow's pages on ``mlflow.db``: what ``make screenshots`` runs.

Exit status: 0 done, 2 something the caller must change.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mnist_batchnorm.core.files import write_bytes
from mnist_batchnorm.mlflow_sync.uri import TRAINING_RUNS, charts_page
from scripts import browser
from scripts.browser import BrowserError, Window

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
STORE = Path("mlflow.db")
IMAGES = Path("docs/images")

EXPERIMENT = "mnist-batchnorm"
VARIANTS = ("bn", "plain")
MODEL, ALIAS = "mnist-bn", "champion"
METRICS = [f"curves/{name}_{kind}" for name in ("train", "valid") for kind in ("accuracy", "loss")]

COLOURS = 256  # of a palette; text and lines need no more

# Two charts a row, low enough that two rows are in sight, as if one had pulled their corner.
ARRANGE = """() => {
    for (const [key, value] of Object.entries(localStorage))
        localStorage.setItem(
            key, value.replace('"name":"curves",', '"name":"curves","columns":2,"cardHeight":240,')
        );
}"""


@dataclass(frozen=True)
class Shown:
    """What the pictures are of.

    Attributes:
        experiment: id of the training runs' experiment.
        runs: the newest training run of each network: its name by its id, batch norm first.
        only: the store has no others.
    """

    experiment: str
    runs: Mapping[str, str]
    only: bool


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of mlflow.db")
    root = parser.parse_args().root.resolve()
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING")
    try:
        take(root)
    except (BrowserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def take(root: Path) -> None:
    """Write all pictures, or none.

    Raises:
        BrowserError: There is nothing to take pictures of, or nothing to take them with.
    """
    browser.find_chromium()
    if not (root / STORE).is_file():
        raise BrowserError(f"no {STORE}; run `dvc repro` first")
    store = f"sqlite:///{root / STORE}"
    shown = find(store)
    with browser.serving(store, root) as address, browser.browser() as chromium:
        pictures = {name: picture(chromium, address, name, shown) for name in PICTURES}
    for name, content in pictures.items():
        path = IMAGES / f"{name}.png"
        write_bytes(root / path, content)
        print(f"{path}: {len(content) / 1000:.0f} kB")


def find(store: str) -> Shown:
    """Find what the pictures are of.

    Raises:
        BrowserError: Something is missing.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise BrowserError(f"{STORE} has no experiment {EXPERIMENT}; run `dvc repro` first")
    runs: list[Run] = client.search_runs([experiment.experiment_id], TRAINING_RUNS)
    newest: dict[str, str] = {}
    for variant in VARIANTS:
        run = next((run for run in runs if run.data.params.get("variant") == variant), None)
        if run is None:
            raise BrowserError(f"{STORE} has no training run of {variant}; run `dvc repro` first")
        newest[run.info.run_id] = run.info.run_name
    if not has_champion(client):
        raise BrowserError(f"{STORE} has no model {MODEL}@{ALIAS}; run `dvc repro` first")
    return Shown(experiment.experiment_id, newest, len(runs) == len(newest))


def has_champion(client: "MlflowClient") -> bool:
    """Tell whether a version of the model has the alias."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version_by_alias(MODEL, ALIAS)
    except MlflowException:
        return False
    return True


def show_charts(window: Window, shown: Shown) -> None:
    """Show the learning curves of both runs."""
    runs = TRAINING_RUNS
    if not shown.only:  # of many runs' curves one sees none
        ids = ", ".join(f"'{run}'" for run in shown.runs)
        runs = f"attributes.run_id IN ({ids})"
    window.open(charts_page(shown.experiment, runs))
    names = list(shown.runs.values())
    window.lines(METRICS[0], names)
    window.page.evaluate(ARRANGE)
    window.page.reload()
    fold_sidebar(window)
    for metric in METRICS:
        window.lines(metric, names)
    window.page.get_by_role("heading", name=METRICS[0], exact=True).scroll_into_view_if_needed()


def show_comparison(window: Window, shown: Shown) -> None:
    """Show what differs between the runs."""
    page = window.page
    window.open(browser.comparison(shown.experiment, list(shown.runs)))
    page.get_by_role("button", name="Visualizations").click()  # away with them: two runs are few
    for table in ("Parameters", "Metrics"):
        page.get_by_role("switch", name=f"{table} - Show diff only").check()
    fold_sidebar(window)
    page.get_by_role("rowheader", name="variant", exact=True).wait_for()
    page.get_by_role("link", name=METRICS[0], exact=True).wait_for()
    page.get_by_role("heading", name="Comparing").scroll_into_view_if_needed()


def show_model(window: Window, shown: Shown) -> None:
    """Show the versions of the model and their aliases."""
    window.open(browser.registered(MODEL))
    fold_sidebar(window)
    window.page.get_by_role("row").filter(has_text=ALIAS).wait_for()


# With the window's size: what matters is in sight, and legible at the README's 800 pixels.
PICTURES: Mapping[str, tuple[Callable[[Window, Shown], None], tuple[int, int]]] = {
    "mlflow-curves": (show_charts, (1160, 816)),
    "mlflow-compare": (show_comparison, (960, 964)),
    "mlflow-model": (show_model, (1000, 520)),
}


def picture(chromium: "Browser", address: str, name: str, shown: Shown) -> bytes:
    """Return a picture as PNG.

    Raises:
        BrowserError: The page does not show what it should.
    """
    from playwright.sync_api import Error

    show, size = PICTURES[name]
    with browser.window(chromium, address, *size) as window:
        page = window.page
        try:
            show(window, shown)
            page.get_by_role("button", name="MLflow Assistant").evaluate(
                "button => { button.style.visibility = 'hidden' }"
            )
            page.mouse.move(0, 0)  # where it makes nothing light up
            return compressed(page.get_by_role("main").screenshot(animations="disabled"))
        except Error as error:  # as after an update of MLflow's
            raise BrowserError(f"{name}: {page.url} does not look as expected: {error}") from error


def fold_sidebar(window: Window) -> None:
    """Leave the page all the width."""
    window.page.get_by_role("button", name="Toggle sidebar").click()


def compressed(png: bytes) -> bytes:
    """Return a PNG with a palette."""
    with Image.open(io.BytesIO(png)) as image, io.BytesIO() as stream:
        # not by how often a colour occurs, for links are few; then to the middle of what it is for
        method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
        palette = image.convert("RGB").quantize(COLOURS, method, kmeans=1, dither=dither)
        palette.save(stream, "PNG", optimize=True)
        return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
