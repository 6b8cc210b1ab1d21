"""Pictures of digits, as people have them, brought to the form of MNIST's images.

The form is that of MNIST's authors (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/;
LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998,
section III.A): the digit is scaled to fit a box of 20 x 20 pixels, its aspect ratio kept and its
greys by anti-aliasing, and moved so that its centre of mass is the centre of 28 x 28 pixels.

The page of ``mnist-bn serve`` does the same in the browser (``serve/page/picture.js``), so that
both give a network the same pixels; a test sends the same pictures through both.
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

# What browsers read too, by Pillow's own decoders; no format that it starts a program for.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # the largest of telephones; 0.7 GB of memory at most while it is read
WORKING_SIDE = 512  # pixels; to shrink a larger picture first takes the noise out of it

BOX = 20  # pixels, the larger side of a digit: of 55,000 images all but 12 have it
CENTRE = 14  # row and column of the pixel where the centre of mass is: of all 55,000
CONTRAST = 32  # grey levels between paper and ink; less is no drawing
PAPER = 0.95  # share of the border that is paper and its noise; the rest may be ink
FULL = 0.9  # quantile of the ink that counts as full ink
EDGE = 96  # of 255, how much ink ends the search for the digit's edge
OPAQUE = 128  # of 255, from where on one sees what is there rather than what is behind
FEW = 0.01  # share of pixels that are no sign of dark ink


@dataclass(frozen=True)
class Digit:
    """A picture in the form of MNIST's images.

    Attributes:
        pixels: uint8 ``[28, 28]``, 0 = background, 255 = full ink.
        done: what was done to the picture, in order, in a few words each.
    """

    pixels: npt.NDArray[np.uint8]
    done: tuple[str, ...]


def read(content: bytes, name: str) -> Digit:
    """Read a picture and bring it to the form of MNIST's images.

    Args:
        content: of the file.
        name: of the picture, for messages.

    Raises:
        UserError: It is no picture in one of `FORMATS`, damaged, too large, or shows nothing.
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
        grey, steps = _to_grey(picture)
    digit = normalize(grey, name)
    return Digit(digit.pixels, (*done, *steps, *digit.done))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say in a person's words what Pillow raises."""
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


def _to_grey(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return a picture in 256 grey levels and opaque, and what that took."""
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
    grey = picture.convert("L")  # ITU-R 601-2 luma, as Pillow documents
    if picture.mode.startswith("RGB") and not _is_grey(picture):
        done.append("turned grey")
    if alpha is not None and alpha.getextrema() != (255, 255):
        paper = _background(grey, alpha)
        grey = Image.composite(grey, Image.new("L", grey.size, paper), alpha)
        done.append(f"laid on {'white' if paper else 'black'}")
    return grey, done


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue = (picture.getchannel(channel) for channel in "RGB")
    return not any(
        ImageChops.difference(one, other).getbbox() for one, other in ((red, green), (green, blue))
    )


def _background(grey: Image.Image, alpha: Image.Image) -> int:
    """Choose what to lay a transparent picture on: white, unless all that one sees is light."""
    seen = grey.histogram(alpha.point([0] * OPAQUE + [255] * (256 - OPAQUE)))
    return 0 if sum(seen[:128]) <= FEW * sum(seen) else 255


def normalize(grey: Image.Image, name: str) -> Digit:
    """Bring a grey picture to the form of MNIST's images; one that has it stays as it is.

    Args:
        grey: of mode ``L``.
        name: of the picture, for messages.

    Raises:
        UserError: It shows nothing.
    """
    if is_normal(grey):
        return Digit(np.array(grey), ())
    longer = max(grey.size)
    if longer > WORKING_SIDE:
        grey = _scale(grey, WORKING_SIDE, Image.Resampling.BOX)
    ink, inverted = _to_ink(grey, name)
    box = ink.point([0] * EDGE + [255] * (256 - EDGE)).getbbox()
    assert box is not None  # `_to_ink` finds some
    cropped = ink.crop(box)
    fitted = _scale(cropped, BOX, Image.Resampling.BILINEAR)
    done = ["inverted"] if inverted else []
    if cropped.size != grey.size:
        done.append("cropped")
    if fitted.size != cropped.size or longer > WORKING_SIDE:
        done.append("scaled to {} x {}".format(*fitted.size))
    return Digit(_centred(np.array(fitted)), (*done, "centred"))


def is_normal(grey: Image.Image) -> bool:
    """Tell whether a picture of mode ``L`` looks as MNIST's images do."""
    if grey.size != (SIDE, SIDE):
        return False
    box = grey.getbbox()
    if box is None or _level(_border(grey), 0.5) != 0:
        return False
    longer = max(box[2] - box[0], box[3] - box[1])
    centre = _centre_of_mass(np.array(grey))
    return BOX - 2 <= longer <= BOX and all(abs(pixel - CENTRE) <= 1 for pixel in centre)


def _scale(grey: Image.Image, longer: int, filter_: Image.Resampling) -> Image.Image:
    """Scale a picture so that its longer side has so many pixels; halves are rounded up."""
    now = max(grey.size)
    width, height = (max(1, (2 * side * longer + now) // (2 * now)) for side in grey.size)
    # one axis after the other as on the page: which goes first, Pillow decides by the sizes
    return grey.resize((width, grey.height), filter_).resize((width, height), filter_)


def _to_ink(grey: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """Return how much ink is where, 0 to 255, and whether the picture was dark on light.

    Paper is what most of the border is, ink what differs most from it. The paper's noise, as the
    border has it, becomes 0 and full ink 255.

    Raises:
        UserError: Nothing differs much.
    """
    histogram, border = grey.histogram(), _border(grey)
    paper = _level(border, 0.5)
    present = [level for level, count in enumerate(histogram) if count]
    darkest, lightest = present[0], present[-1]
    inverted = paper - darkest > lightest - paper
    if inverted:
        grey = ImageOps.invert(grey)
        histogram.reverse()
        border.reverse()
        paper, lightest = _level(border, 0.5), 255 - darkest
    middle = (paper + lightest) // 2
    low = min(_level(border, PAPER), middle)
    high = _level([0] * (middle + 1) + histogram[middle + 1 :], FULL)
    if high - low < CONTRAST:
        raise UserError(f"{name}: nothing stands out from its background; expected a digit")
    span = high - low
    levels = [min(255, max(0, (510 * (v - low) + span) // (2 * span))) for v in range(256)]
    return grey.point(levels), inverted


def _border(grey: Image.Image) -> list[int]:
    """Return the histogram of the outermost rows and columns, corners counted twice."""
    width, height = grey.size
    lines = (
        (0, 0, width, 1),
        (0, height - 1, width, height),
        (0, 0, 1, height),
        (width - 1, 0, width, height),
    )
    histograms = (grey.crop(line).histogram() for line in lines)
    return [sum(counts) for counts in zip(*histograms, strict=True)]


def _level(histogram: Sequence[int], quantile: float) -> int:
    """Return the lowest level with at least this share of the pixels at or below it."""
    return int(np.searchsorted(np.cumsum(histogram), quantile * sum(histogram)))


def _centre_of_mass(ink: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return row and column of the centre of mass, to the nearest pixel, halves up."""
    total = int(ink.sum())
    row, column = (
        (2 * int(ink.sum(axis=1 - axis) @ np.arange(ink.shape[axis])) + total) // (2 * total)
        for axis in (0, 1)
    )
    return row, column


def _centred(ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put ink of at most 20 x 20 pixels on 28 x 28, its centre of mass in the centre."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    (rows, columns), (row, column) = ink.shape, _centre_of_mass(ink)
    top = min(max(CENTRE - row, 0), SIDE - rows)
    left = min(max(CENTRE - column, 0), SIDE - columns)
    pixels[top : top + rows, left : left + columns] = ink
    return pixels
