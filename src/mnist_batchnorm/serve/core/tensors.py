"""Check the input tensor of a request, and read its raw form."""

from collections.abc import Sequence
from math import isfinite, prod
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.serve.core.protocol import BYTES_OF, PIXELS, SHAPES_OF, Float32, refuse
from mnist_batchnorm.serve.core.settings import Limits

Float64 = npt.NDArray[np.float64]

TENSOR = "inputs[0]"
DATA = f"{TENSOR}.data"


def check_shape(shape: object, datatype: object, limits: Limits) -> tuple[Sequence[int], str]:
    """Return the input's shape and datatype; RequestError: the models do not accept them."""
    if not isinstance(datatype, str) or datatype not in SHAPES_OF:
        refuse(f"{TENSOR}.datatype", datatype, " or ".join(SHAPES_OF), "datatype")
    if (
        not isinstance(shape, list)
        or not shape
        or any(type(length) is not int for length in shape)
        or tuple(shape[1:]) not in SHAPES_OF[datatype]
        or shape[0] < 0
    ):
        known = (f"[n, {', '.join(map(str, tail))}]" for tail in SHAPES_OF[datatype])
        refuse(f"{TENSOR}.shape", shape, f"{' or '.join(known)} of {datatype}", "shape")
    if shape[0] > limits.rows:
        refuse(f"{TENSOR}.shape", f"{shape[0]} images", f"at most {limits.rows}", "rows", 413)
    return shape, datatype


def decode_raw(
    raw: bytes,
    size: object,
    size_field: str,
    shape: Sequence[int],
    datatype: str,
    limits: Limits,
    data_field: str = DATA,
) -> Float32:
    """Return a raw tensor, little-endian and row-major, as float32 ``[n, 784]``.

    `size` is the number of bytes that the request claims in `size_field`; shape and datatype are
    checked. Raises RequestError if the sizes disagree or a value is not finite.
    """
    expected = prod(shape) * BYTES_OF[datatype]
    if type(size) is not int or size != expected:
        refuse(size_field, size, f"{expected} for {datatype} {shape}", "binary")
    if len(raw) != expected:
        refuse("the body", f"{len(raw)} bytes of tensor", f"{expected}", "binary")
    if datatype == "UINT8":
        return network_input(np.frombuffer(raw, np.uint8).reshape(shape[0], PIXELS))
    return check_finite(np.frombuffer(raw, "<f4"), limits, data_field)


def convert_images(values: Float64, datatype: str, limits: Limits) -> Float32:
    """Convert the numbers of a checked tensor to the network's input, float32 ``[n, 784]``."""
    if datatype == "UINT8":
        wrong = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values > 255))
        if len(wrong):
            refuse_pixel(int(wrong[0]), f"{values[wrong[0]]:.17g}", "an integer from 0 to 255")
        return network_input(values.astype(np.uint8).reshape(-1, PIXELS))
    return check_finite(values, limits)


def check_finite(
    values: npt.NDArray[np.floating[Any]], limits: Limits, field: str = DATA
) -> Float32:
    """Return the images, float32 ``[n, 784]``; raises RequestError if a pixel must be finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported below
        flat = values.astype(np.float32, copy=False).reshape(-1)
        # a finite sum of squares has finite terms; an infinite one may have, too
        if isfinite(flat.dot(flat)) or limits.nonfinite or np.isfinite(flat).all():
            return flat.reshape(-1, PIXELS)
    index = int(np.flatnonzero(~np.isfinite(flat))[0])
    expected = "a finite FP32 (the server's option --allow-nonfinite lets it pass)"
    return refuse_pixel(index, str(flat[index]), expected, field, "nonfinite")


def refuse_pixel(
    index: int, got: str, expected: str, field: str = DATA, reason: str = "data"
) -> NoReturn:
    """Raise RequestError for the pixel at `index` among those of all images."""
    image, pixel = divmod(index, PIXELS)
    refuse(f"{field}, image {image}, pixel {pixel}", got, expected, reason)
