"""A file that is not what it seems is a finding of the gate, never an exception."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mnist_batchnorm.parity import Gate, ParityReport
from tests.parity.conftest import Judge
from tests.support.parity_cases import Case, dynamo_export

pytestmark = pytest.mark.usefixtures("few_passes")

Fault = Callable[[onnx.ModelProto], None]


def require_finding(report: ParityReport) -> dict[str, str]:
    json.dumps(report.to_json(), allow_nan=False)
    assert report.verdict == "no parity"
    assert report.table()
    return {check.name: check.detail for check in report.checks if check.status == "failed"}


def initializer(**values: object) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        for name, value in values.items():
            setattr(graph.graph.initializer[0], name, value)

    return fault


def short(n: int) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        tensor = graph.graph.initializer[0]
        tensor.raw_data = tensor.raw_data[:-n]

    return fault


def huge(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].dims[:] = [2**40, 2**40]


def huge_expand(graph: onnx.ModelProto) -> None:
    shape = onnx.numpy_helper.from_array(np.array([2**40, 784]), "shape")
    graph.graph.initializer.append(shape)
    graph.graph.node.insert(0, onnx.helper.make_node("Expand", ["linear1.bias", "shape"], ["big"]))


def segment(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].segment.begin = 1


def unknown_input_type(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.elem_type = 999


def no_node(graph: onnx.ModelProto) -> None:
    del graph.graph.node[:]


def no_input(graph: onnx.ModelProto) -> None:
    del graph.graph.input[:]


def no_output(graph: onnx.ModelProto) -> None:
    del graph.graph.node[-1].output[:]


def node_without_inputs(graph: onnx.ModelProto) -> None:
    del graph.graph.node[1].input[:]


def nameless_input(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].input[0] = ""


def reads_itself(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].input[0] = graph.graph.node[1].output[0]


def reference_attribute(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].attribute[0].ref_attr_name = "elsewhere"


def attribute(value: object) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        node = graph.graph.node[0]
        name = node.attribute[0].name
        node.attribute[0].CopyFrom(onnx.helper.make_attribute(name, value))

    return fault


def part(name: str) -> Fault:
    def fault(graph: onnx.ModelProto) -> None:
        getattr(graph if hasattr(graph, name) else graph.graph, name).add()

    return fault


FAULTS = {
    "3 bytes short": short(3),
    "4 bytes short": short(4),
    "type 0": initializer(data_type=0),
    "type 999": initializer(data_type=999),
    "type string": initializer(data_type=onnx.TensorProto.STRING),
    "huge": huge,
    "huge Expand": huge_expand,
    "segment": segment,
    "input of type 999": unknown_input_type,
    "no node": no_node,
    "no input": no_input,
    "node without outputs": no_output,
    "node without inputs": node_without_inputs,
    "nameless input": nameless_input,
    "reads itself": reads_itself,
    "reference attribute": reference_attribute,
    "string attribute": attribute("one"),
    "list attribute": attribute([1, 2]),
    "tensor attribute": attribute(onnx.numpy_helper.from_array(np.ones(2, np.float32))),
    "graph attribute": attribute(onnx.GraphProto(name="inner")),
    "training_info": part("training_info"),
    "functions": part("functions"),
    "sparse_initializer": part("sparse_initializer"),
    "quantization_annotation": part("quantization_annotation"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_malformed_part(judge: Judge, mlp: Case, name: str) -> None:
    graph = mlp.kept()
    FAULTS[name](graph)
    problems = require_finding(judge(graph))
    assert problems.keys() & {"file", "structure", "weights"}


def test_text_that_is_not_utf8(judge: Judge, mlp: Case) -> None:
    graph = mlp.kept()
    onnx.helper.set_model_props(graph, {"a.key": "value"})
    problems = require_finding(judge(graph.SerializeToString().replace(b"a.key", b"a.k\xff\xfe")))
    assert problems == {"file": "text that is not UTF-8 in StringStringEntryProto.key"}


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_truncated(judge: Judge, mlp: Case, keep: int) -> None:
    assert "file" in require_finding(judge(mlp.kept().SerializeToString()[:keep]))


def test_html_instead_of_onnx(judge: Judge) -> None:
    assert "file" in require_finding(judge(b"<html>not found</html>"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gate, bytes]:
    """A network small enough to be judged often, and its honest file."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model(torch.randn(64, 6, generator=generator))
    weights = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(model.eval().state_dict(), weights)
    gate = Gate(weights, model=model)
    graph = dynamo_export(model, np.zeros((2, 6), np.float32), fold=False)
    return gate, graph.SerializeToString()


def test_the_small_file_passes(small: tuple[Gate, bytes], tmp_path: Path) -> None:
    gate, good = small
    path = tmp_path / "good.onnx"
    path.write_bytes(good)
    report = gate.check(path)
    assert report.verdict == "parity", report.table()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_never_raises(
    data: st.DataObject, small: tuple[Gate, bytes], tmp_path: Path
) -> None:
    gate, good = small
    content = bytearray(good)
    for position in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        content[position] ^= data.draw(st.integers(1, 255))
    keep = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content[:keep])
    report = gate.check(path)
    json.dumps(report.to_json(), allow_nan=False)
    assert report.table()
