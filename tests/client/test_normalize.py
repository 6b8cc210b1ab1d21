"""Pictures as people have them become the images that the networks were trained on."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mnist_batchnorm.artifacts.splits import Split, load_split, network_input
from mnist_batchnorm.client import normalize as picture
from mnist_batchnorm.core.errors import UserError

if TYPE_CHECKING:
    from mnist_batchnorm.network.model import Checkpoint

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def split(prepared: Path) -> Split:
    """500 real test images."""
    return load_split(prepared / "test.safetensors")


@pytest.fixture(scope="module")
def seven(split: Split) -> Image.Image:
    """The first 7 among them, as dark ink on a large white sheet, off its centre."""
    digit = Image.fromarray(split.images[split.labels == 7][0])
    sheet = Image.new("L", (300, 200), 255)
    sheet.paste(ImageOps.invert(digit.resize((112, 112), Image.Resampling.BICUBIC)), (150, 60))
    return sheet


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, kind, **options)
        return stream.getvalue()


def read(image: Image.Image, kind: str = "PNG", **options: object) -> picture.Digit:
    return picture.read(encoded(image, kind, **options), "a.png")


def distance(one: Pixels, other: Pixels) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


# --- images of MNIST ----------------------------------------------------------------------------


def test_images_of_mnist_stay_as_they_are(split: Split) -> None:
    for image in split.images:
        digit = read(Image.fromarray(image))
        assert digit.done == ()
        assert np.array_equal(digit.pixels, image)


def test_faint_image_of_mnist_stays_as_it_is(split: Split) -> None:
    """How bright it is may be what someone wants to see the network's answer to."""
    faint = (split.images[0] * 0.4).astype(np.uint8)
    digit = read(Image.fromarray(faint))
    assert digit.done == ()
    assert np.array_equal(digit.pixels, faint)


@pytest.mark.parametrize("shift", [(3, 0), (0, -3), (4, 4)])
def test_small_image_off_its_centre_is_centred(split: Split, shift: tuple[int, int]) -> None:
    image = split.images[split.labels == 1][0]
    assert np.argwhere(image).min() >= 4  # nothing is lost at the edge
    digit = read(Image.fromarray(np.roll(image, shift, (0, 1))))
    assert digit.done[-1] == "centred"
    assert distance(digit.pixels, image) < 4


Distort = Callable[[Image.Image, np.random.Generator], Image.Image]


def on_sheet(image: Image.Image, random: np.random.Generator, scale: int) -> Image.Image:
    """Three times as large and more, somewhere on a sheet twice as large again."""
    side = 28 * scale
    sheet = Image.new("L", (2 * side, 2 * side + 31))
    place = random.integers(0, side, size=2)
    large = image.resize((side, side), Image.Resampling.BICUBIC)
    sheet.paste(large, (int(place[0]), int(place[1])))
    return sheet


def photographed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Grey ink on grey paper, with a camera's noise."""
    ink = np.asarray(on_sheet(image, random, 6)) / 255
    levels = 190 - 110 * ink + random.normal(0, 6, ink.shape)
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


DISTORTIONS: dict[str, Distort] = {
    "larger, off the centre": lambda image, random: on_sheet(image, random, 3),
    "dark on light": lambda image, random: ImageOps.invert(on_sheet(image, random, 3)),
    "much larger": lambda image, random: ImageOps.invert(on_sheet(image, random, 10)),
    "photograph": photographed,
    "two levels": lambda image, random: on_sheet(image, random, 4).point([0] * 128 + [255] * 128),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_network_reads_distorted_images_as_well_as_the_original(
    split: Split, trained: "Checkpoint", name: str
) -> None:
    import torch

    random = np.random.default_rng(0)
    images, labels = split.images[:100], split.labels[:100]
    distorted = [DISTORTIONS[name](Image.fromarray(image), random) for image in images]
    found = np.stack([read(image).pixels for image in distorted])
    squeezed = np.stack([np.asarray(image.resize((28, 28))) for image in distorted])
    model = trained.model()

    def accuracy(pixels: Pixels) -> float:
        with torch.no_grad():
            answers = model(torch.from_numpy(network_input(pixels))).argmax(1).numpy()
        return float((answers == labels).mean())

    assert accuracy(squeezed) < 0.5
    assert accuracy(found) > accuracy(images) - 0.03


# --- the form -----------------------------------------------------------------------------------


@given(
    points=st.lists(
        st.tuples(st.integers(20, 180), st.integers(20, 130)), min_size=2, max_size=6, unique=True
    ),
    width=st.integers(4, 30),
)
def test_whatever_is_drawn_gets_mnists_form(points: list[tuple[int, int]], width: int) -> None:
    from PIL import ImageDraw

    sheet = Image.new("L", (200, 150), 255)
    ImageDraw.Draw(sheet).line(points, fill=0, width=width)
    digit = picture.normalize(sheet, "a.png")
    rows, columns = (np.flatnonzero(digit.pixels.any(axis)) for axis in (1, 0))
    sides = [int(ends[-1] - ends[0]) + 1 for ends in (rows, columns)]
    assert digit.pixels.shape == (28, 28)
    assert digit.pixels.dtype == np.uint8
    assert 19 <= max(sides) <= 20
    mass = digit.pixels / digit.pixels.sum()
    for axis, ends in ((1, rows), (0, columns)):
        at_edge = ends[0] == 0 or ends[-1] == 27
        assert at_edge or abs(float(mass.sum(axis) @ np.arange(28)) - 14) <= 0.5 + 1e-9


def test_colours_do_not_matter_which_way_round(seven: Image.Image) -> None:
    dark, light = read(seven), read(ImageOps.invert(seven))
    assert dark.done == ("inverted", *light.done)
    assert np.array_equal(dark.pixels, light.pixels)


def test_place_on_the_sheet_does_not_matter(seven: Image.Image) -> None:
    moved = ImageOps.expand(seven, (7, 90, 31, 2), fill=255)
    assert np.array_equal(read(moved).pixels, read(seven).pixels)


def test_it_says_what_it_did(seven: Image.Image) -> None:
    coloured = Image.merge("RGB", [seven, seven, seven.point(lambda v: 100 + v * 155 // 255)])
    assert read(coloured).done == (
        "turned grey",
        "inverted",
        "cropped",
        "scaled to 16 x 20",
        "centred",
    )


# --- kinds of files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", picture.FORMATS)
def test_format(seven: Image.Image, kind: str) -> None:
    lossless = {"WEBP": {"lossless": True}}.get(kind, {})
    digit = read(seven, kind, **lossless)
    difference = distance(digit.pixels, read(seven).pixels)
    assert difference < 2 if kind == "JPEG" else difference == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_mode_of_png(seven: Image.Image, mode: str) -> None:
    digit = read(seven.convert(mode))
    assert digit.done == read(seven).done  # no colour, nothing transparent: nothing done about it
    assert np.array_equal(digit.pixels, read(seven).pixels)


def test_two_levels(seven: Image.Image) -> None:
    grey = seven.point([0] * 128 + [255] * 128)
    assert np.array_equal(read(grey.convert("1")).pixels, read(grey).pixels)


def test_sixteen_bits(seven: Image.Image) -> None:
    wide = Image.fromarray(np.asarray(seven).astype(np.uint16) * 257)
    digit = read(wide)
    assert digit.done[0] == "reduced to 256 grey levels"
    assert np.array_equal(digit.pixels, read(seven).pixels)


def test_cmyk(seven: Image.Image) -> None:
    digit = read(seven.convert("RGB").convert("CMYK"), "JPEG")
    assert distance(digit.pixels, read(seven).pixels) < 2


@pytest.mark.parametrize(("ink", "paper"), [(0, "white"), (255, "black")])
def test_transparent_paper(seven: Image.Image, ink: int, paper: str) -> None:
    """Black ink on nothing is seen on white, white ink on nothing on black."""
    flat = Image.new("L", seven.size, ink)
    drawn = Image.merge("LA", [flat, ImageOps.invert(seven)])
    digit = read(drawn)
    assert digit.done[0] == f"laid on {paper}"
    assert distance(digit.pixels, read(seven).pixels) < 0.5


def test_transparent_colour_of_a_palette(seven: Image.Image) -> None:
    two = seven.point([0] * 128 + [255] * 128)
    digit = read(two.convert("P"), "GIF", transparency=255)
    assert digit.done[0] == "laid on white"
    assert np.array_equal(digit.pixels, read(two).pixels)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation(seven: Image.Image, orientation: int) -> None:
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    turned = seven.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    digit = read(turned, exif=exif)
    assert digit.done[0] == "turned upright"
    assert np.array_equal(digit.pixels, read(seven).pixels)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_of_several_pictures(seven: Image.Image, kind: str) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    others = [seven.rotate(angle, fillcolor=255) for angle in (40, 80)]
    digit = read(seven, kind, save_all=True, append_images=others, **options)
    assert digit.done[0] == "took the first of its pictures"
    assert distance(digit.pixels, read(seven).pixels) < 1


# --- what cannot be read ------------------------------------------------------------------------


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a picture of a known kind"),
        (b"\x89PNG\r\n\x1a\n", "not a picture of a known kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "save it as PNG or JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "save it as PNG or JPEG"),
        (png_of(99, 99, bytes(range(100)) * 99)[:-60], "damaged ("),
        (png_of(8000, 8000), "8,000 x 8,000 pixels, expected at most 50,000,000 in all"),
        (png_of(60000, 60000), "expected at most 50,000,000 pixels"),
        (png_of(1, 1, bytes(2)), "nothing stands out"),
        (png_of(99, 99, bytes(99 * 100)), "nothing stands out"),
    ],
)
def test_useless_file(content: bytes, says: str) -> None:
    with pytest.raises(UserError) as refused:
        picture.read(content, "scans/7.png")
    assert str(refused.value).startswith("scans/7.png: ")
    assert says in str(refused.value)


def test_noise_is_no_digit() -> None:
    noise = np.random.default_rng(0).integers(120, 136, (90, 90), np.uint8)
    with pytest.raises(UserError, match="nothing stands out"):
        read(Image.fromarray(noise))


def test_file_that_is_too_large(seven: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(seven)
    monkeypatch.setattr(picture, "MAX_BYTES", len(content))
    picture.read(content, "a.png")
    with pytest.raises(UserError, match=r"a\.png: larger than 0 MiB"):
        picture.read(content + b"\0", "a.png")


@pytest.mark.parametrize("kind", picture.FORMATS)
def test_damage_anywhere_is_a_users_mistake(seven: Image.Image, kind: str) -> None:
    content = encoded(seven.resize((60, 40)), kind)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content[: random.integers(1, len(content) + 1)])
        for place in random.integers(0, len(damaged), random.integers(0, 4)):
            damaged[place] = random.integers(0, 256)
        with contextlib.suppress(UserError):
            assert picture.read(bytes(damaged), "a.png").pixels.shape == (28, 28)
            continue
        refused += 1
    assert refused > 100
