"""Answers bit for bit: encoded alone, and after decoding requests of every form."""

import json
import struct
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mnist_batchnorm.serve.core.encode import classified, encode, pack
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import InferRequest
from mnist_batchnorm.serve.core.settings import Limits
from tests.support.parsers import PARSERS
from tests.support.request_forms import (
    Form,
    bits,
    body_of,
    check,
    expected_of,
    forms,
    images_of,
    seeds,
    session,
    split_answer,
)

MODEL = Model("m", "1", "0" * 64, None, None, lambda images: images)
NO_IMAGE = np.empty((0, 784), np.float32)


@given(seeds, st.integers(0, 5))
def test_json_holds_every_float32_as_it_is(seed: int, rows: int) -> None:
    logits = np.random.default_rng(seed).integers(0, 2**32, (rows, 10), np.uint32).view(np.float32)
    logits[~np.isfinite(logits)] = -0.0
    body, json_length = encode(InferRequest(NO_IMAGE), logits, MODEL)
    assert json_length is None
    (output,) = json.loads(body)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [rows, 10])
    assert bits(np.array(output["data"], np.float32)) == bits(logits.ravel())


def test_json_has_no_word_for_what_is_not_finite() -> None:
    """Only a server that was told to passes such numbers; raw tensors hold them as they are."""
    logits = np.array([[np.nan, np.inf, -np.inf, *range(7)]], np.float32)
    body, _ = encode(InferRequest(NO_IMAGE), logits, MODEL)
    assert json.loads(body)["outputs"][0]["data"][:4] == [None, None, None, 0.0]
    body, json_length = encode(InferRequest(NO_IMAGE, binary=True), logits, MODEL)
    _, raw = split_answer(body, json_length)
    assert raw == bits(logits)


def test_a_raw_tensor_stands_behind_the_json() -> None:
    logits = np.arange(20, dtype=np.float32).reshape(2, 10)
    request = InferRequest(NO_IMAGE, id="7", parameters={"a": 1}, binary=True)
    content, raw = split_answer(*encode(request, logits, replace(MODEL, version="v")))
    assert content == {
        "model_name": "m",
        "model_version": "v",
        "id": "7",
        "parameters": {"a": 1},
        "outputs": [
            {
                "name": "logits",
                "datatype": "FP32",
                "shape": [2, 10],
                "parameters": {"binary_data_size": 80},
            }
        ],
    }
    assert raw == struct.pack("<20f", *range(20))


def test_what_was_not_asked_is_not_answered() -> None:
    body, _ = encode(InferRequest(NO_IMAGE), np.zeros((1, 10), np.float32), MODEL)
    assert list(json.loads(body)) == ["model_name", "model_version", "outputs"]
    body, _ = encode(InferRequest(NO_IMAGE, id=""), np.zeros((1, 10), np.float32), MODEL)
    assert json.loads(body)["id"] == ""


def test_of_equal_logits_the_lower_class_is_first() -> None:
    logits = np.array(
        [[0, 2, 2, -1, 2, 0, 0, 0, 0, 0], [-0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1]], np.float32
    )
    texts = ["2.0:1", "2.0:2", "2.0:4", "1.0:9", "-0.0:0", "0.0:1"]
    assert list(classified(logits, 3)) == texts


def test_a_class_has_its_logit_as_the_list_of_logits_has_it() -> None:
    logits = np.array([[8.271688, 0.1, -3.7832954, 1e-10, 1 / 3, 0, 0, 0, 0, 0]], np.float32)
    listed, _ = encode(InferRequest(NO_IMAGE), logits, MODEL)
    ranked, _ = encode(InferRequest(NO_IMAGE, classes=3), logits, MODEL)
    assert b"8.271688,0.1," in listed
    assert b'"8.271688:0","0.33333334:4","0.1:1"' in ranked


def test_a_raw_text_stands_behind_its_length() -> None:
    assert pack(["a", "", "ü"]) == b"\1\0\0\0a\0\0\0\0\2\0\0\0\xc3\xbc"


@given(seeds, st.integers(0, 4), forms, st.sampled_from(sorted(PARSERS)))
def test_every_form_gives_onnx_runtimes_logits(
    seed: int, rows: int, form: Form, parser: str
) -> None:
    images = images_of(seed, rows, form)
    request = PARSERS[parser].decode(*body_of(images, form), Limits())
    body, json_length = encode(request, session().run(request.images), MODEL)
    check(body, json_length, form, expected_of(images))
