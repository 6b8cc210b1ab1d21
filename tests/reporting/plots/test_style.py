"""The networks' looks, and images as PNG."""

import base64
import io

import numpy as np

from mnist_batchnorm.reporting.plots.style import LOOKS, png_uri


def test_networks_differ_by_more_than_color() -> None:
    looks = LOOKS.values()
    for aspect in ("color", "line", "marker"):
        assert len({getattr(look, aspect) for look in looks}) == len(looks)


def test_picture_of_an_image_is_that_image_in_ink_on_paper() -> None:
    from matplotlib.image import imread

    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    content = base64.b64decode(png_uri(image).partition("base64,")[2])
    shown = np.asarray(imread(io.BytesIO(content), format="png"))[..., :3]
    np.testing.assert_allclose(shown, np.repeat(1 - image[..., None] / 255, 3, axis=2), atol=0.01)
