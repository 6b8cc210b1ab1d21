"""The page of ``mnist-bn serve`` in a headless Chromium; run, it takes the README's picture of it.

Exit status: 0 done, 2 something the caller must change.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mnist_batchnorm.core.files import write_bytes
from scripts import browser
from scripts.browser import PATIENCE, BrowserError
from scripts.screenshots import IMAGES, ROOT, compressed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PICTURE = IMAGES / "serve-page.png"
MODELS = ("mnist-bn=models/bn.onnx", "mnist-plain=models/plain.onnx")
SIZE = (1000, 900)  # of the window: the README shows it at 800 pixels

Stroke = Sequence[tuple[float, float]]  # points in parts of the board, from its upper left corner
SEVEN: Sequence[Stroke] = (((0.28, 0.22), (0.72, 0.22), (0.44, 0.82)),)
# between a 4 and a 9, so that there is something to see
UNSURE: Sequence[Stroke] = (
    ((0.48, 0.2), (0.32, 0.36), (0.36, 0.5), (0.66, 0.48)),
    ((0.66, 0.24), (0.62, 0.84)),
)


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of models/")
    root = parser.parse_args().root.resolve()
    try:
        browser.find_chromium()
        with serving(root, *MODELS) as url, browser.browser() as chromium:
            content = take(chromium, url)
        write_bytes(root / PICTURE, content)
    except (BrowserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{PICTURE}: {len(content) / 1000:.0f} kB")
    return 0


def take(chromium: "Browser", url: str) -> bytes:
    """Return a picture of the page of a server, with an answer on it, as PNG.

    Raises:
        BrowserError: It shows none.
    """
    from playwright.sync_api import Error, expect

    with browser.window(chromium, url, *SIZE) as window:
        page = window.page
        try:
            window.open("")
            draw(page, UNSURE)
            expect(page.locator("#verdict")).to_contain_text(
                re.compile(r"\d"), timeout=PATIENCE * 1000
            )
            page.mouse.move(0, 0)  # where it makes nothing light up
            return compressed(page.screenshot(full_page=True, animations="disabled"))
        except (AssertionError, Error) as error:
            raise BrowserError(f"{url} gives no answer: {error}") from error


def draw(page: "Page", strokes: Sequence[Stroke]) -> None:
    """Draw on the board with the mouse."""
    box = page.locator("#board").bounding_box()
    if box is None:
        raise BrowserError(f"{page.url} has no board to draw on")
    for stroke in strokes:
        (x, y), *others = (
            (box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in stroke
        )
        page.mouse.move(x, y)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(x, y, steps=5)
        page.mouse.up()


@contextlib.contextmanager
def serving(folder: Path, *words: str, port: int = 0) -> Iterator[str]:
    """Run ``mnist-bn serve`` in a folder.

    Args:
        folder: where.
        words: its arguments and options, but for the port.
        port: to listen on; 0 for a free one.

    Yields:
        The server's address.

    Raises:
        BrowserError: It does not start.
    """
    program = str(Path(sys.executable).with_name("mnist-bn"))
    command = [program, "serve", "--port", str(port), *words]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield address(server, log)
        finally:
            browser.stop(server)


def address(server: subprocess.Popen[bytes], log: BinaryIO) -> str:
    """Wait until a server says where it is.

    Raises:
        BrowserError: It ends before, or does not say.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = server.poll() is not None
        # not seek and read: the server's own place in the file is the same
        lines = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace").splitlines()
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # half written
                record = json.loads(line)
                if record.get("event") == "serving":
                    return str(record["url"])
        if ended or time.monotonic() > deadline:
            raise BrowserError("\n".join(["mnist-bn serve does not start:", *lines[-20:]]))
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
