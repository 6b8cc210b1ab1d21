"""The page of ``mnist-bn serve`` as a person uses it, in Debian's Chromium."""

import base64
import contextlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from scripts.browser import BrowserError
from scripts.page import SEVEN, draw

from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.client import normalize as picture
from mnist_batchnorm.serve.http import routes
from scripts import browser, page
from tests.conftest import ROOT
from tests.support import candidates, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

STATIC = ROOT / "src/mnist_batchnorm/serve/page"
TOKEN = "a-token-that-is-long-enough"
BN, PLAIN = 0, 1  # the networks' cards
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
# of an element with all that it lies in
OPACITY = """element => {
  let opacity = 1;
  for (; element; element = element.parentElement) opacity *= getComputedStyle(element).opacity;
  return opacity;
}"""

try:
    browser.find_chromium()
    missing = ""
except BrowserError as error:
    missing = str(error)
needs_chromium = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two proven networks, and one that is not and sees a 3 in everything."""
    folder = tmp_path_factory.mktemp("page") / "project"
    serving.lay(folder)
    (folder / "unproven.onnx").write_bytes(candidates.shifted(99.0).graph(folded=False))
    (folder / "token").write_text(TOKEN)
    return folder


@pytest.fixture(scope="module")
def address(project: Path) -> Iterator[str]:
    """A server of both proven networks."""
    both = ("mnist-bn=models/bn.onnx", "mnist-plain=models/bn-folded.onnx")
    with serving.running(*both, folder=project) as server:
        yield server.url


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    from playwright.sync_api import expect

    expect.set_options(timeout=browser.PATIENCE * 1000)
    with browser.browser() as started:
        yield started


Open = Callable[..., "Page"]


@pytest.fixture
def visit(chromium: "Browser") -> Iterator[Open]:
    """Open the page of a server; nothing may be missing, blocked or asked for elsewhere."""
    with contextlib.ExitStack() as opened:
        problems: list[str] = []

        def visit(
            url: str, *, complaints: bool = False, ready: bool = True, **options: Any
        ) -> "Page":
            context = chromium.new_context(
                **{"viewport": {"width": 1000, "height": 900}, "reduced_motion": "reduce"} | options
            )
            opened.callback(context.close)
            context.set_default_timeout(browser.PATIENCE * 1000)
            new = context.new_page()

            def asked(request: "Request") -> None:
                if not request.url.startswith(f"{url}/"):
                    problems.append(f"asks for {request.url}")

            new.on("request", asked)
            new.on("pageerror", lambda error: problems.append(error.message))
            if not complaints:  # which a failed request is to Chromium
                new.on("console", lambda message: problems.append(message.text))
            new.goto(f"{url}/")
            if ready:
                new.locator(".network .facts").first.wait_for()
            return new

        yield visit
        assert problems == []


def digit(opened: "Page", network: int = BN) -> "Locator":
    return opened.locator(".network .digit").nth(network)


def shows(found: "Locator", text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect

    expect(found).to_have_text(text)


def asked(opened: "Page", action: Callable[[], object]) -> list[int]:
    """Do something; return the pixels that the first network is asked about."""
    with opened.expect_request("**/v2/models/mnist-bn/infer") as sent:
        action()
    (image,) = json.loads(sent.value.post_data or "")["inputs"]
    assert (image["datatype"], image["shape"]) == ("UINT8", [1, 28, 28])
    pixels: list[int] = image["data"]
    return pixels


def choose(opened: "Page", name: str, content: bytes) -> None:
    opened.get_by_label("Choose picture").set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": content}
    )


# --- drawing ------------------------------------------------------------------------------------


@needs_chromium
def test_a_seven_is_drawn_with_the_mouse(address: str, visit: Open) -> None:
    opened = visit(address)
    draw(opened, SEVEN)
    shows(digit(opened, BN), "7")
    shows(digit(opened, PLAIN), "7")
    shows(opened.locator("#verdict"), "Both see a 7.")
    number = r"(>\s99\.9|\d+\.\d|<\s0\.1)\s%"
    shows(opened.locator(".network .sure").first, re.compile(rf"^{number}, then \d:\s{number}$"))
    facts = re.compile(r"^mnist-bn, version [0-9a-f]+, verified, [\d.]+\sms$")
    shows(opened.locator(".network .facts").first, facts)
    shows(opened.locator("#done"), re.compile(r"^Cropped, scaled to \d+ . 20, centred\.$"))
    shows(opened.get_by_role("status"), re.compile(r"^Both see a 7\. With batch norm: 7, .*%\.$"))
    rows = opened.get_by_role("row").filter(has=opened.get_by_role("rowheader"))
    assert [row.inner_text().split()[0] for row in rows.all()] == list("0123456789")


@needs_chromium
def test_answers_change_as_one_draws(address: str, visit: Open) -> None:
    opened = visit(address)
    draw(opened, [[(0.5, 0.2), (0.5, 0.8)]])
    shows(digit(opened), "1")
    draw(opened, [[(0.5, 0.8), (0.75, 0.8), (0.75, 0.5), (0.5, 0.5)]])
    shows(digit(opened), "6")
    opened.get_by_role("button", name="Undo").click()
    shows(digit(opened), "1")
    opened.get_by_role("button", name="Clear").click()
    shows(digit(opened), "\N{EN DASH}")
    shows(opened.locator("#done"), "Nothing yet.")
    opened.get_by_role("button", name="Undo").click()
    shows(digit(opened), "1")


@needs_chromium
def test_a_seven_is_drawn_by_touch(address: str, visit: Open) -> None:
    opened = visit(address, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 800})
    box = opened.locator("#board").bounding_box()
    assert box
    finger = opened.context.new_cdp_session(opened)
    ends = list(itertools.pairwise(SEVEN[0]))
    path = [
        (x + (to_x - x) * part / 4, y + (to_y - y) * part / 4)
        for (x, y), (to_x, to_y) in ends
        for part in range(5)
    ]
    for i, (x, y) in enumerate(path):
        point = {"x": box["x"] + box["width"] * x, "y": box["y"] + box["height"] * y}
        kind = "touchMove" if i else "touchStart"
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    shows(digit(opened), "7")
    assert opened.evaluate("scrollY") == 0  # it drew, and did not scroll


@needs_chromium
def test_a_seven_is_drawn_with_keys_alone(address: str, visit: Open) -> None:
    opened = visit(address)
    keys = opened.keyboard
    keys.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "board"
    assert opened.locator("#board").evaluate("board => getComputedStyle(board).outlineWidth") != "0"

    def press(key: str, times: int) -> None:
        for _ in range(times):
            keys.press(key)

    press("ArrowUp", 8)
    press("ArrowLeft", 7)
    keys.press("Space")
    shows(opened.get_by_role("status"), "Pen down.")
    press("ArrowRight", 14)
    for _ in range(9):  # down, and a little to the left
        keys.down("ArrowDown")
        keys.down("ArrowLeft")
        keys.up("ArrowLeft")
        keys.up("ArrowDown")
    keys.press("Space")
    shows(digit(opened), "7")
    shows(opened.get_by_role("status"), re.compile(r"^Both see a 7\."))
    keys.press("Control+z")  # the stroke is one step
    shows(digit(opened), "\N{EN DASH}")
    keys.press("Tab")
    keys.press("Tab")  # nothing to undo or to clear: both buttons are passed over
    assert opened.evaluate("document.activeElement.id") != "board"
    opened.locator("#board").focus()
    keys.press("Enter")
    keys.press("Shift+ArrowDown")
    keys.press("Escape")
    shows(digit(opened), re.compile(r"\d"))
    keys.press("Delete")
    shows(digit(opened), "\N{EN DASH}")


# --- pictures -----------------------------------------------------------------------------------


def sheet() -> Image.Image:
    """A blue 7 on white, off the centre."""
    image = Image.new("RGB", (300, 200), "white")
    stroke = [(100, 40), (185, 40), (130, 170)]
    ImageDraw.Draw(image).line(stroke, fill=(20, 30, 90), width=18, joint="curve")
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, kind, **options)
        return stream.getvalue()


def pictures() -> dict[str, bytes]:
    """Pictures by how they are special."""
    grey = sheet().convert("L")
    noise = np.random.default_rng(0).normal(0, 8, (900, 1200))
    photo = np.asarray(grey.resize((1200, 900), Image.Resampling.BICUBIC)) * 0.5 + 60 + noise
    drawn = Image.merge("LA", [Image.new("L", grey.size), ImageOps.invert(grey)])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = sheet().transpose(Image.Transpose.ROTATE_90)
    return {
        "colors": encoded(sheet()),
        "light on dark": encoded(ImageOps.invert(sheet())),
        "palette": encoded(sheet().quantize(16)),
        "large and noisy": encoded(Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8))),
        "tiny": encoded(grey.resize((30, 20))),
        "odd size": encoded(grey.resize((517, 641))),
        "transparent": encoded(drawn),
        "white on nothing": encoded(
            Image.merge("LA", [Image.new("L", grey.size, 255), ImageOps.invert(grey)])
        ),
        "JPEG": encoded(sheet(), "JPEG", quality=90),
        "JPEG that lies on its side": encoded(turned, "JPEG", quality=95, exif=exif),
        "16 bits": encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "CMYK": encoded(sheet().convert("CMYK"), "JPEG"),
    }


@needs_chromium
def test_page_and_python_give_the_network_the_same_pixels(
    address: str, visit: Open, prepared: Path
) -> None:
    opened = visit(address)
    split = load_split(prepared / "test.safetensors")
    mnist = {f"MNIST {i}": encoded(Image.fromarray(split.images[i])) for i in range(3)}
    lossy = {"JPEG", "JPEG that lies on its side", "CMYK", "transparent", "white on nothing"}
    for name, content in (pictures() | mnist).items():
        found = np.array(asked(opened, partial(choose, opened, "a.png", content)))
        expected = picture.read(content, name)
        off = np.abs(found - expected.pixels.ravel().astype(int))
        # other versions of the decoders, or of the canvas, may round otherwise
        assert off.max() <= (2 if name in lossy else 0), name
        # what a browser does unasked, the page cannot tell
        unseen = {"turned upright", "reduced to 256 grey levels"}
        same = [step for step in expected.done if step not in unseen] or ["sent as it is"]
        said = ", ".join(same).replace(" x ", " \N{MULTIPLICATION SIGN} ")
        shows(opened.locator("#done"), f"{said[0].upper()}{said[1:]}.")


@needs_chromium
def test_a_picture_is_dropped_or_pasted(address: str, visit: Open) -> None:
    opened = visit(address)
    content = encoded(sheet(), "JPEG")
    script = """([way, content]) => {
        const bytes = Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0));
        const carried = new DataTransfer();
        carried.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(way === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: carried })
            : new ClipboardEvent("paste", { ...options, clipboardData: carried }));
    }"""
    for way in ("drop", "paste"):
        opened.evaluate(script, [way, base64.b64encode(content).decode()])
        shows(digit(opened), "7")
        draw(opened, [[(0.5, 0.2), (0.5, 0.8)]])  # on a new sheet
        shows(digit(opened), "1")
        opened.get_by_role("button", name="Undo").click()
        shows(digit(opened), "7")
        opened.get_by_role("button", name="Clear").click()
        shows(digit(opened), "\N{EN DASH}")


@needs_chromium
def test_an_unusable_picture_is_reported(address: str, visit: Open) -> None:
    opened = visit(address)
    trouble = opened.get_by_role("alert")
    choose(opened, "a.png", b"no picture")
    shows(trouble, "This is not a picture, or it is damaged. Save it as PNG or JPEG.")
    choose(opened, "a.png", encoded(Image.new("L", (90, 90), 200)))
    shows(trouble, "Nothing stands out from the picture's background. A digit should.")
    choose(opened, "a.png", encoded(Image.new("1", (8000, 8000))))
    shows(trouble, re.compile("^The picture has 8000 . 8000 pixels, more than 50,000,000 in all"))
    choose(opened, "a.png", encoded(sheet()))
    shows(digit(opened), "7")
    assert not trouble.is_visible()


# --- the server ---------------------------------------------------------------------------------


@needs_chromium
def test_one_request_at_a_time_is_sent_and_the_newest_wins(address: str, visit: Open) -> None:
    opened = visit(address)
    held: list[Route] = []
    opened.route("**/v2/models/mnist-bn/infer", lambda route: held.append(route))  # noqa: PLW0108
    draw(opened, SEVEN[:1])
    opened.wait_for_timeout(50)
    draw(opened, [[(0.1, 0.9), (0.9, 0.9)]])
    draw(opened, [[(0.1, 0.1), (0.9, 0.1)]])
    opened.wait_for_timeout(100)
    assert len(held) == 1
    held[0].continue_()
    while len(held) < 2:
        opened.wait_for_timeout(10)
    held[1].continue_()
    shows(opened.locator("#verdict"), re.compile(r"\d\.$"))  # both have answered the last image
    assert len(held) == 2
    last = json.loads(held[1].request.post_data or "")["inputs"][0]["data"]
    seen = opened.locator("#sees").evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 28, 28).data)"
    )
    assert last == seen[::4]


@needs_chromium
def test_the_servers_refusals_are_shown_and_retried(address: str, visit: Open) -> None:
    opened = visit(address, complaints=True)
    answers: Iterator[tuple[int, dict[str, str], str]] = iter(
        [(400, {}, "inputs: got 3, expected 1"), (503, {"Retry-After": "1"}, "queue full")]
    )

    def refuse(route: "Route") -> None:
        status, headers, said = next(answers, (0, {}, ""))
        if status:
            route.fulfill(status=status, headers=headers, body=json.dumps({"error": said}))
        else:
            route.continue_()

    opened.route("**/v2/models/mnist-bn/infer", refuse)
    trouble = opened.get_by_role("alert")
    opened.locator("#board").click()
    shows(trouble, "The server refuses: inputs: got 3, expected 1.")
    opened.locator("#board").click()
    shows(trouble, "The server is busy: queue full. Trying again …")
    shows(digit(opened), re.compile(r"\d"))  # it did
    assert not trouble.is_visible()


@needs_chromium
def test_the_page_reconnects_to_a_restarted_server(project: Path, visit: Open) -> None:
    with serving.running("mnist-bn=models/bn.onnx", folder=project) as server:
        opened = visit(server.url, complaints=True)
        shows(opened.locator("#alone"), "This server has one of them: mnist-bn.")
    draw(opened, SEVEN)
    trouble = opened.get_by_role("alert")
    shows(trouble, "The server does not answer. Trying again …")
    port = str(server.address[1])
    with serving.running("mnist-bn=models/bn.onnx", "--port", port, folder=project):
        shows(digit(opened), "7")
        assert not trouble.is_visible()


@needs_chromium
def test_an_unverified_network_is_marked_and_a_token_asked_for(project: Path, visit: Open) -> None:
    models = ("mnist-bn=models/bn.onnx", "mnist-plain=unproven.onnx", "--allow-unverified")
    with serving.running(*models, "--token-file", "token", folder=project) as server:
        opened = visit(server.url, complaints=True, ready=False)
        field = opened.get_by_label("This server wants a token.")
        field.wait_for()
        assert links(opened) == ["Try the API", "OpenAPI"]
        use = opened.get_by_role("button", name="Use it")
        field.fill("a-wrong-token-of-some-length")
        use.click()
        trouble = opened.locator("#trouble")
        shows(trouble, re.compile("^The server does not take this token: "))
        field.fill(TOKEN)
        use.click()
        banner = opened.locator("#banner")
        shows(banner, re.compile(r"^UNVERIFIED\. .* mnist-plain: reports/parity\.json "))
        assert not field.is_visible()
        assert not trouble.is_visible()
        assert links(opened) == ["Try the API", "OpenAPI"]
        draw(opened, SEVEN)
        shows(opened.locator("#verdict"), "They disagree: 7 or 3.")
        shows(opened.locator(".network .facts").nth(PLAIN), re.compile("UNVERIFIED"))
        stored = opened.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert stored == [0, 0, ""]


@needs_chromium
def test_the_footers_links_work_and_motion_is_only_on_request(address: str, visit: Open) -> None:
    opened = visit(address)
    opened.locator("#metrics").wait_for()
    assert links(opened) == ["Try the API", "OpenAPI", "Metrics"]
    for link in opened.locator("footer a").all():
        assert opened.request.get(f"{address}/{link.get_attribute('href')}").ok
    style = "fill => getComputedStyle(fill).transitionDuration"
    assert opened.locator(".fill").first.evaluate(style) == "0s"
    opened.emulate_media(reduced_motion="no-preference")
    assert opened.locator(".fill").first.evaluate(style) == "0.12s"


def links(opened: "Page") -> list[str]:
    """What a person can follow at the end of the page."""
    found = opened.locator("footer a").all()
    return [link.inner_text() for link in found if link.is_visible()]


# --- how it looks -------------------------------------------------------------------------------


@needs_chromium
def test_a_narrow_screen_needs_no_horizontal_scrolling(address: str, visit: Open) -> None:
    opened = visit(address, viewport={"width": 320, "height": 700})
    draw(opened, SEVEN)
    shows(digit(opened), "7")
    for width in (320, 390, 768):
        opened.set_viewport_size({"width": width, "height": 700})
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        for name in ("Undo", "Clear"):
            box = opened.get_by_role("button", name=name).bounding_box()
            assert box
            assert box["height"] >= 44  # pixels, for a finger


@needs_chromium
def test_the_screenshot_for_the_readme_is_taken(address: str, chromium: "Browser") -> None:
    with Image.open(io.BytesIO(page.take(chromium, address))) as image:
        assert image.width == page.SIZE[0]
        assert len(image.convert("RGB").getcolors(1 << 16) or []) > 20


def test_no_screenshot_is_taken_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["page", "--root", str(tmp_path)])
    assert page.main() == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / page.PICTURE).exists()


def luminance(color: str) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mixed(above: str, below: str, opacity: float) -> str:
    """What a color looks like on another one through which it can be seen."""
    pairs = [(int(above[i : i + 2], 16), int(below[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * a + (1 - opacity) * b):02x}" for a, b in pairs)


def palette(theme: int) -> dict[str, str]:
    """A theme's colors by name."""
    rules = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), re.DOTALL)
    return dict(re.findall(r"--(\w+): (#\w{6})", rules[theme]))


@pytest.mark.parametrize("theme", [0, 1], ids=THEMES)
def test_contrast_is_that_of_wcag_aa(theme: int) -> None:
    colors = palette(theme)
    for ground in ("paper", "card"):
        for text in ("text", "quiet", "good", "bad"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for mark in ("edge", "first", "second"):
            assert contrast(colors[mark], colors[ground]) >= 3, (mark, ground)
    for bar in ("first", "second"):
        assert contrast(colors[bar], colors["track"]) >= 3, bar


@needs_chromium
def test_an_old_answer_fades_and_stays_readable(address: str, visit: Open) -> None:
    opened = visit(address, complaints=True)
    draw(opened, SEVEN)
    shows(digit(opened), "7")
    opened.route("**/infer", lambda route: route.fulfill(status=400, body='{"error": "no"}'))
    opened.locator("#board").click()
    shows(opened.locator("#trouble"), "The server refuses: no.")
    for theme, name in enumerate(THEMES):
        opened.emulate_media(color_scheme=name)
        for text in (".network h3", ".network .sure", ".network .facts", ".cell span"):
            assert opened.locator(text).first.evaluate(OPACITY) == 1, text
        assert opened.locator(".track").first.evaluate(OPACITY) < 1
        opacity = digit(opened).evaluate(OPACITY)
        assert opacity < 1
        colors = palette(theme)
        faded = mixed(colors["text"], colors["card"], opacity)
        assert contrast(faded, colors["card"]) >= 3  # which is enough for text of this size


# --- what it is made of -------------------------------------------------------------------------


class Tags(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_inline_or_from_elsewhere() -> None:
    tags = Tags()
    tags.feed((STATIC / "index.html").read_text())
    used = set()
    for tag, attributes in tags.found:
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        place = attributes.get("src") if tag != "link" else attributes.get("href")
        if place:
            used.add(place.removeprefix("static/"))
    for script in STATIC.glob("*.js"):
        used |= set(re.findall(r'from "\./([\w.]+)"', script.read_text()))
    assert used | {"index.html"} == {path.name for path in STATIC.iterdir()}
    assert all(path.suffix in routes.CONTENT_TYPES for path in STATIC.iterdir())


def test_constants_are_those_of_python() -> None:
    script = (STATIC / "picture.js").read_text()
    names = ("BOX", "CENTER", "MAX_PIXELS", "WORKING_SIDE", "CONTRAST")
    for name in (*names, "PAPER", "FULL_INK", "EDGE", "OPAQUE", "MAX_DARK_SHARE"):
        (value,) = re.findall(rf"^const {name} = ([\d._]+);", script, re.MULTILINE)
        assert float(value.replace("_", "")) == getattr(picture, name), name
