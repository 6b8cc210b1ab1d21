"""Colors, fonts and the two networks' looks; rendering to SVG and PNG."""

import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.image import imsave

STYLE = mpl.rc_params_from_file(
    Path(__file__).with_name("report.mplstyle"), use_default_template=False
)
SURFACE, INK = STYLE["figure.facecolor"], STYLE["text.color"]
MUTED, RULE = STYLE["axes.edgecolor"], STYLE["grid.color"]
BATCH_NORM, PLAIN = "#0063a6", "#b34700"  # distinguishable with any color vision
ALARM = "#a40e26"
ERRORS = "#8a2252"


@dataclass(frozen=True)
class Look:
    """How a network is drawn; the networks differ not by color alone."""

    label: str
    color: str
    line: str
    marker: str

    @property
    def style(self) -> dict[str, Any]:
        """Matplotlib's keyword arguments for a line."""
        return {"color": self.color, "linestyle": self.line, "marker": self.marker}


LOOKS = {"bn": Look("batch norm", BATCH_NORM, "-", "o"), "plain": Look("plain", PLAIN, "--", "s")}


@contextlib.contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield a figure, its size in inches, in `STYLE`, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, title: str) -> str:
    """Render a figure, its title for screen readers."""
    # the salt makes ids unique among the pictures of one page
    with mpl.rc_context({"svg.hashsalt": title}):
        text = io.StringIO()
        omitted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        # not savefig, which draws everything twice, the first time for the layout only
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Title": title, **omitted})  # type: ignore[no-untyped-call]
    return text.getvalue()


def png_uri(image: npt.NDArray[np.uint8]) -> str:
    """Encode a uint8 ``[28, 28]`` image, 255 = full ink, as a data URI of dark ink on white."""
    png = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}  # else Matplotlib's version
    imsave(png, image, cmap="gray_r", vmin=0, vmax=255, format="png", metadata=metadata)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
