"""Convert pictures of digits to the format of MNIST's images.

The format is that of MNIST's authors (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/;
LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998,
section III.A): the digit is scaled to fit a box of 20 x 20 pixels, keeping its aspect ratio, with
gray levels from anti-aliasing, and shifted so that its center of mass is the center of 28 x 28
pixels.

``serve/page/picture.js`` is the same algorithm in the browser: the page shows the network's input
while a person draws, and sends no picture, only these pixels. A test sends the same pictures
through both.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from mnist_batchnorm.artifacts.splits import SIDE
from mnist_batchnorm.core.errors import UserError

# Formats that browsers read too, and that Pillow decodes itself without starting a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # the largest of phone cameras; at most 0.7 GB of memory while reading
WORKING_SIDE = 512  # pixels; a larger picture is shrunk first, which removes noise

BOX = 20  # pixels, the larger side of a digit: in all but 12 of 55,000 images
CENTER = 14  # row and column of the center of mass: in all 55,000
CONTRAST = 32  # gray levels between paper and ink, at least
PAPER = 0.95  # share of the border that is paper and its noise; the rest may be ink
FULL_INK = 0.9  # quantile of the ink that counts as full ink
EDGE = 96  # of 255, ink that counts as part of the digit when cropping
OPAQUE = 128  # of 255, alpha from which a pixel is visible
MAX_DARK_SHARE = 0.01  # of the visible pixels, if the ink is light


@dataclass(frozen=True)
class Digit:
    """A picture in the format of MNIST's images."""

    pixels: npt.NDArray[np.uint8]  # [28, 28], 0 = background, 255 = full ink
    done: tuple[str, ...]  # the steps of the conversion, in order, in a few words each


def read(content: bytes, name: str) -> Digit:
    """Read the bytes of a picture file and convert it to the format of MNIST's images.

    Raises:
        UserError: The file is not in one of `FORMATS`, is damaged, too large, or shows nothing.
    """
    if len(content) > MAX_BYTES:
        raise UserError(f"{name}: larger than {MAX_BYTES // 2**20} MiB; make the picture smaller")
    with _explained(name):
        picture = Image.open(io.BytesIO(content), formats=FORMATS)  # decodes no pixel yet
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{name}: {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} in all; "
                "make the picture smaller"
            )
        done = ["took the first of its pictures"] if getattr(picture, "is_animated", False) else []
        picture.load()
        if picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            done.append("turned upright")
        ImageOps.exif_transpose(picture, in_place=True)  # a copy of a large one would be large
        gray, steps = _to_gray(picture)
    digit = normalize(gray, name)
    return Digit(digit.pixels, (*done, *steps, *digit.done))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # about sizes, which `read` judges, and about damage that does not prevent reading
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: not a picture of a known kind; save it as PNG or JPEG "
            f"(also read: {', '.join(FORMATS[2:])})"
        ) from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels; make the picture smaller"
        ) from None
    except Exception as error:  # noqa: BLE001 - of a damaged file, decoders raise all kinds
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: damaged ({reason}); save the picture again") from None


def _to_gray(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    if picture.mode.startswith("I"):  # 16 bits a pixel
        levels = np.asarray(picture) >> 8
        return Image.fromarray(levels.astype(np.uint8)), ["reduced to 256 grey levels"]
    done = []
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    elif picture.mode not in {"1", "L", "RGB"}:  # palettes, CMYK
        picture = picture.convert("RGB")
    gray = picture.convert("L")  # ITU-R 601-2 luma, as Pillow documents
    if picture.mode.startswith("RGB") and not _is_gray(picture):
        done.append("turned grey")
    if alpha is not None and alpha.getextrema() != (255, 255):
        paper = _background(gray, alpha)
        gray = Image.composite(gray, Image.new("L", gray.size, paper), alpha)
        done.append(f"laid on {'white' if paper else 'black'}")
    return gray, done


def _is_gray(picture: Image.Image) -> bool:
    red, green, blue = (picture.getchannel(channel) for channel in "RGB")
    return not any(
        ImageChops.difference(one, other).getbbox() for one, other in ((red, green), (green, blue))
    )


def _background(gray: Image.Image, alpha: Image.Image) -> int:
    # white, unless all visible pixels are light
    seen = gray.histogram(alpha.point([0] * OPAQUE + [255] * (256 - OPAQUE)))
    return 0 if sum(seen[:128]) <= MAX_DARK_SHARE * sum(seen) else 255


def normalize(gray: Image.Image, name: str) -> Digit:
    """Convert a picture of mode ``L`` to the format of MNIST's images, unless it has it.

    Raises:
        UserError: Nothing stands out from the background; names the picture.
    """
    if is_normal(gray):
        return Digit(np.array(gray), ())
    longer = max(gray.size)
    if longer > WORKING_SIDE:
        gray = _scale(gray, WORKING_SIDE, Image.Resampling.BOX)
    ink, inverted = _to_ink(gray, name)
    box = ink.point([0] * EDGE + [255] * (256 - EDGE)).getbbox()
    assert box is not None  # `_to_ink` finds some
    cropped = ink.crop(box)
    fitted = _scale(cropped, BOX, Image.Resampling.BILINEAR)
    done = ["inverted"] if inverted else []
    if cropped.size != gray.size:
        done.append("cropped")
    if fitted.size != cropped.size or longer > WORKING_SIDE:
        done.append("scaled to {} x {}".format(*fitted.size))
    return Digit(_centered(np.array(fitted)), (*done, "centred"))


def is_normal(gray: Image.Image) -> bool:
    """Whether a picture of mode ``L`` has the format of MNIST's images."""
    if gray.size != (SIDE, SIDE):
        return False
    box = gray.getbbox()
    if box is None or _level(_border(gray), 0.5) != 0:
        return False
    longer = max(box[2] - box[0], box[3] - box[1])
    center = _center_of_mass(np.array(gray))
    return BOX - 2 <= longer <= BOX and all(abs(pixel - CENTER) <= 1 for pixel in center)


def _scale(gray: Image.Image, longer: int, filter_: Image.Resampling) -> Image.Image:
    """Scale the longer side of a picture to `longer` pixels; halves are rounded up."""
    now = max(gray.size)
    width, height = (max(1, (2 * side * longer + now) // (2 * now)) for side in gray.size)
    # one axis after the other as on the page: which goes first, Pillow decides by the sizes
    return gray.resize((width, gray.height), filter_).resize((width, height), filter_)


def _to_ink(gray: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """Return the amount of ink of each pixel, 0 to 255, and whether the picture was dark on light.

    Paper is the median of the border; ink is at the end of the gray levels that is farther from
    it. Noise of the paper, as seen in the border, becomes 0 and full ink 255.
    """
    histogram, border = gray.histogram(), _border(gray)
    paper = _level(border, 0.5)
    present = [level for level, count in enumerate(histogram) if count]
    darkest, lightest = present[0], present[-1]
    inverted = paper - darkest > lightest - paper
    if inverted:
        gray = ImageOps.invert(gray)
        histogram.reverse()
        border.reverse()
        paper, lightest = _level(border, 0.5), 255 - darkest
    middle = (paper + lightest) // 2
    low = min(_level(border, PAPER), middle)
    high = _level([0] * (middle + 1) + histogram[middle + 1 :], FULL_INK)
    if high - low < CONTRAST:
        raise UserError(f"{name}: nothing stands out from its background; expected a digit")
    span = high - low
    levels = [min(255, max(0, (510 * (v - low) + span) // (2 * span))) for v in range(256)]
    return gray.point(levels), inverted


def _border(gray: Image.Image) -> list[int]:
    # histogram of the outermost rows and columns, corners counted twice
    pixels = np.asarray(gray)
    lines = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    histogram: list[int] = np.bincount(lines, minlength=256).tolist()
    return histogram


def _level(histogram: Sequence[int], quantile: float) -> int:
    # the lowest level with at least this share of the pixels at or below it
    return int(np.searchsorted(np.cumsum(histogram), quantile * sum(histogram)))


def _center_of_mass(ink: npt.NDArray[np.uint8]) -> tuple[int, int]:
    # row and column, to the nearest pixel, halves up
    total = int(ink.sum())
    row, column = (
        (2 * int(ink.sum(axis=1 - axis) @ np.arange(ink.shape[axis])) + total) // (2 * total)
        for axis in (0, 1)
    )
    return row, column


def _centered(ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    (rows, columns), (row, column) = ink.shape, _center_of_mass(ink)
    top = min(max(CENTER - row, 0), SIDE - rows)
    left = min(max(CENTER - column, 0), SIDE - columns)
    pixels[top : top + rows, left : left + columns] = ink
    return pixels
