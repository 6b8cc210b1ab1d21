"""A file that is not what it seems is a finding of the gate, never an exception."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_batchnorm.dataset import network_input
from mnist_batchnorm.export import embed_provenance, export_onnx
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity import GraphReport, Reference, check_graph
from tests.parity.conftest import LIMIT, Judge, random_images

Fault = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def good(checkpoint: Checkpoint, weights: Path) -> bytes:
    graph = export_onnx(checkpoint.model(), 20, fold=False)
    embed_provenance(graph, weights, checkpoint)
    content: bytes = graph.SerializeToString()
    return content


def require_finding(report: GraphReport) -> dict[str, str]:
    json.dumps(report.to_json(), allow_nan=False)
    assert not report.parity
    return {check.name: check.detail for check in report.checks if not check.passed}


def initializer(**values: object) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        tensor = graph.graph.initializer[0]
        for name, value in values.items():
            setattr(tensor, name, value)

    return fault


def short(n: int) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        tensor = graph.graph.initializer[0]
        tensor.raw_data = tensor.raw_data[:-n]

    return fault


def huge(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].dims[:] = [2**40, 2**40]


def segment(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].segment.begin = 1


def unknown_input_type(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.elem_type = 999


def no_output(graph: onnx.ModelProto) -> None:
    del graph.graph.node[-1].output[:]


def reference_attribute(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].attribute[0].ref_attr_name = "elsewhere"


def attribute(value: object) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        node = graph.graph.node[0]
        name = node.attribute[0].name
        node.attribute[0].CopyFrom(onnx.helper.make_attribute(name, value))

    return fault


FAULTS = {
    "3 bytes short": short(3),
    "4 bytes short": short(4),
    "type 0": initializer(data_type=0),
    "type 999": initializer(data_type=999),
    "type string": initializer(data_type=onnx.TensorProto.STRING),
    "huge": huge,
    "segment": segment,
    "input of type 999": unknown_input_type,
    "node without outputs": no_output,
    "reference attribute": reference_attribute,
    "string attribute": attribute("one"),
    "list attribute": attribute([1, 2]),
    "tensor attribute": attribute(onnx.numpy_helper.from_array(np.ones(2, np.float32))),
    "graph attribute": attribute(onnx.GraphProto(name="inner")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_malformed_part(judge: Judge, good: bytes, name: str) -> None:
    graph = onnx.load_from_string(good)
    FAULTS[name](graph)
    problems = require_finding(judge(graph.SerializeToString()))
    assert problems.keys() & {"structure", "weights"}


def test_text_that_is_not_utf8(judge: Judge, good: bytes) -> None:
    content = good.replace(b"mnist_batchnorm.input", b"mnist_batchnorm.inp\xff\xfe")
    problems = require_finding(judge(content))
    assert problems == {"file": "text that is not UTF-8 in StringStringEntryProto.key"}


def test_checker_refuses_it_but_the_outputs_are_still_tried(judge: Judge, good: bytes) -> None:
    graph = onnx.load_from_string(good)
    graph.graph.node[0].op_type = "Gem"
    problems = require_finding(judge(graph.SerializeToString()))
    assert "onnx.checker refuses it" in problems["structure"]
    assert problems["weights"] == "not compared: not a valid ONNX file on its own"
    assert "ONNX Runtime cannot load it" in problems["outputs"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_never_raises(
    data: st.DataObject, good: bytes, checkpoint: Checkpoint, weights: Path, tmp_path: Path
) -> None:
    content = bytearray(good)
    # most of the file is numbers: half of the positions are drawn from what is around them
    start = st.one_of(st.integers(0, 2_000), st.integers(0, len(good) - 1))
    for position in data.draw(st.lists(start, max_size=4)):
        place = data.draw(st.sampled_from([position, len(good) - 1 - position]))
        content[place] ^= data.draw(st.integers(1, 255))
    keep = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content[:keep])
    images = network_input(random_images(1, 2))
    reference = Reference.compute(checkpoint.model(), images, np.zeros(2, np.uint8))
    report = check_graph(path, weights, checkpoint, reference, [2], LIMIT, folded=False)
    json.dumps(report.to_json(), allow_nan=False)
    assert report.parity or content[:keep] != good
