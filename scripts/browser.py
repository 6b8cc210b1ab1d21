"""MLflow's pages in a headless Chromium: what scripts/screenshots.py and the tests share.

Every wait has a deadline, and nothing that is started here outlives its ``with``.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from mnist_batchnorm.mlflow_sync.uri import WORKFLOW

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Error, Page, Route

PATIENCE = 60.0  # seconds for whatever one waits for; the machine may be busy
STARTS = 3  # of the server, each on another port
CHROMIUM = ("chromium", "google-chrome")

# The lines of a chart, by colour, once there is one for every run. A chart is what has a heading
# with the metric's name and a legend that names it for every run; a line is a path through several
# points, which no symbol, grid line or sample in the legend is.
LINES = r"""
([metric, runs]) => {
    const labels = runs.map(run => `${run} (${metric})`);
    const lines = {};
    for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
        if (heading.textContent.trim() !== metric) continue;
        let chart = heading;
        while (chart && !labels.every(label => chart.textContent.includes(label)))
            chart = chart.parentElement;
        for (const path of chart ? chart.querySelectorAll("path") : []) {
            const points = (path.getAttribute("d") || "").match(/^M[^MLZ]+(L[^MLZ]+)+$/)
                ? path.getAttribute("d").split("L").length : 0;
            const { width, height } = path.getBoundingClientRect();
            const colour = getComputedStyle(path).stroke;
            if (points > 1 && width > 20 && height > 5)
                lines[colour] = Math.max(points, lines[colour] || 0);
        }
    }
    return Object.keys(lines).length >= runs.length && lines;
}
"""


class BrowserError(Exception):
    """The pages cannot be shown; the message says what to change."""


@dataclass(frozen=True)
class Window:
    """A page in a browser that has seen no other, and what went wrong on it.

    Attributes:
        page: for playwright.
        address: of the server.
        errors: uncaught errors of the page's code.
        outside: addresses other than the server's that it asked for, in vain.
    """

    page: "Page"
    address: str
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def open(self, place: str) -> None:
        """Go to a place on the server, such as `charts_page` returns."""
        self.page.goto(f"{self.address}/{place}")

    def lines(self, metric: str, runs: Sequence[str]) -> dict[str, int]:
        """Wait for the chart of a metric and the lines of all runs in it.

        Args:
            metric: as MLflow calls it; a chart that is out of sight is drawn when scrolled to.
            runs: names of the runs.

        Returns:
            How many points each line goes through, by its colour, ``rgb(200, 45, 76)``.
        """
        arguments = [metric, list(runs)]
        heading = self.page.get_by_role("heading", name=metric, exact=True).first
        heading.scroll_into_view_if_needed()
        lines: dict[str, int] = self.page.wait_for_function(LINES, arg=arguments).json_value()
        return lines


def comparison(experiment: str, runs: Sequence[str]) -> str:
    """Return where runs are compared, which are given by their ids."""
    ids, experiments = quote(json.dumps(list(runs))), quote(json.dumps([experiment]))
    return f"#/compare-runs?runs={ids}&experiments={experiments}&{WORKFLOW}"


def registered(model: str) -> str:
    """Return where the versions of a registered model are."""
    return f"#/models/{quote(model)}?{WORKFLOW}"


def find_chromium() -> str:
    """Return the path of a Chromium.

    Raises:
        BrowserError: There is none, or no playwright to drive it.
    """
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        raise BrowserError("playwright is not installed: make setup") from None
    for name in CHROMIUM:
        if path := shutil.which(name):
            return path
    raise BrowserError("Chromium is not installed: apt-get install chromium")


@contextlib.contextmanager
def browser() -> Iterator["Browser"]:
    """Start a headless Chromium that can reach this machine only.

    Raises:
        BrowserError: There is none, or it does not start.
    """
    path = find_chromium()
    from playwright.sync_api import Error, sync_playwright

    # a wall behind that of `window`: what the browser itself asks for does not pass there
    options = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    # No sandbox, as is playwright's default: with it Chromium refuses to run as root and in many
    # containers, and all that it shows is our own server's.
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=path, args=options, chromium_sandbox=False, timeout=PATIENCE * 1000
            )
        except Error as error:
            raise BrowserError(f"{path} does not start: {error.message}") from error
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def window(chromium: "Browser", address: str, width: int, height: int) -> Iterator[Window]:
    """Open a window on the server, without the panel that MLflow opens beside the first page."""

    # functions, because playwright sets attributes on what a method belongs to
    def failed(error: "Error") -> None:
        # a notice that sizes will be observed in the next frame; no browser's console shows it
        if "ResizeObserver loop" not in error.message:
            new.errors.append(error.message)

    def refuse(route: "Route") -> None:
        new.outside.append(route.request.url)
        route.abort()

    context = chromium.new_context(
        viewport={"width": width, "height": height},
        locale="en-US",
        timezone_id="UTC",
        reduced_motion="reduce",
        service_workers="block",  # whose requests would pass by the route below
    )
    try:
        context.set_default_timeout(PATIENCE * 1000)
        context.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        )
        new = Window(context.new_page(), address)
        elsewhere = re.compile(f"^(?!{re.escape(address)}/|data:|blob:)")
        context.route(elsewhere, refuse)
        new.page.on("pageerror", failed)
        yield new
    finally:
        context.close()


@contextlib.contextmanager
def serving(store: str, folder: Path) -> Iterator[str]:
    """Run MLflow's UI as the Makefile's goal ``ui`` does, on a free port.

    Args:
        store: address of the database.
        folder: where to run it.

    Yields:
        The server's address.

    Raises:
        BrowserError: It does not start.
    """
    with tempfile.TemporaryFile() as log:
        for _ in range(STARTS):
            port = free_port()
            server = start(store, folder, port, log)
            try:
                if answers(server, port):
                    yield f"http://127.0.0.1:{port}"
                    return
            finally:
                stop(server)
            # else it ended: somebody may have taken the port since it was found free
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        raise BrowserError("\n".join(["mlflow ui does not start:", *lines[-20:]]))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start(store: str, folder: Path, port: int, log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start MLflow's UI in a process group of its own."""
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as in the Makefile
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", store]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=others | settings,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server answers; return False when it ends before.

    Raises:
        BrowserError: It does neither.
    """
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None:
        # not urllib, which would ask a proxy
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return True
        except (OSError, http.client.HTTPException):
            pass  # not yet
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise BrowserError(f"mlflow ui does not answer within {PATIENCE:.0f} s")
        time.sleep(0.05)
    return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and all that it has started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # what is left of it
    server.wait(10)
