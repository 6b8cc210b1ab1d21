"""One network, the ways that exporters write it down, and files that are no chain of layers."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mnist_batchnorm.parity.graph import Chain, decode, file_problems, read_chain

W = np.arange(6, dtype=np.float32).reshape(2, 3)  # [out, in]
B = np.array([0.5, -0.5], np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Any],
    shape: tuple[Any, ...] = ("batch", 3),
    output: tuple[Any, ...] = ("batch", 2),
    opset: int = 20,
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "a graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


SPELLINGS = {
    "Gemm": graph([node("Gemm", "x w b", "y", transB=1)], {"w": W, "b": B}),
    "Gemm of the transpose": graph([node("Gemm", "x w b", "y")], {"w": W.T.copy(), "b": B}),
    "MatMul and Add": graph(
        [node("MatMul", "x w", "z"), node("Add", "z b", "y")], {"w": W.T.copy(), "b": B}
    ),
    "Add with the bias first": graph(
        [node("MatMul", "x w", "z"), node("Add", "b z", "y")], {"w": W.T.copy(), "b": B}
    ),
    "weight transposed in the graph": graph(
        [node("Transpose", "w", "t", perm=[1, 0]), node("Gemm", "x t b", "y")], {"w": W, "b": B}
    ),
    "weight through Identity": graph(
        [node("Identity", "w", "i"), node("Gemm", "x i b", "y", transB=1)], {"w": W, "b": B}
    ),
    "value through Identity and Dropout": graph(
        [
            node("Identity", "x", "i"),
            node("Dropout", "i", "d"),
            node("Gemm", "d w b", "y", transB=1),
        ],
        {"w": W, "b": B},
    ),
    "bias by Expand": graph(
        [
            node("Constant", "", "n", value_ints=[2]),
            node("CastLike", "half x", "c"),
            node("Expand", "c n", "e"),
            node("Gemm", "x w e", "y", transB=1),
        ],
        {"w": W, "half": np.float32(0.5)},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_linear_layer(name: str) -> None:
    proto = SPELLINGS[name]
    assert not file_problems(proto)
    chain = read_chain(proto)
    assert not chain.problems
    (step,) = chain.steps
    assert step.operator == "Linear"
    assert step.attributes == {"alpha": 1.0, "beta": 1.0, "transA": 0}
    np.testing.assert_array_equal(step.tensors["weight"], W)
    np.testing.assert_array_equal(
        step.tensors["bias"], B if name != "bias by Expand" else [0.5, 0.5]
    )


FLATTENINGS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Flatten": ([node("Flatten", "x", "y")], {}),
    "Reshape, batch -1": ([node("Reshape", "x s", "y")], {"s": np.array([-1, 6])}),
    "Reshape, batch 0": ([node("Reshape", "x s", "y")], {"s": np.array([0, -1])}),
    "Reshape to a computed shape": (
        [
            node("Shape", "x", "b", start=0, end=1),
            node("Concat", "b six", "s", axis=0),
            node("Reshape", "x s", "y", allowzero=1),
        ],
        {"six": np.array([6])},
    ),
    "Reshape to a gathered shape": (
        [
            node("Shape", "x", "all"),
            node("Gather", "all zero", "b"),
            node("Unsqueeze", "b zero1", "u"),
            node("Concat", "u six", "s", axis=0),
            node("Reshape", "x s", "y"),
        ],
        {"zero": np.int64(0), "zero1": np.array([0]), "six": np.array([6])},
    ),
}


@pytest.mark.parametrize("name", FLATTENINGS)
def test_spellings_of_flatten(name: str) -> None:
    nodes, tensors = FLATTENINGS[name]
    proto = graph(nodes, tensors, ("batch", 2, 3), ("batch", 6))
    assert not file_problems(proto)
    chain = read_chain(proto)
    assert not chain.problems
    (step,) = chain.steps
    assert step.operator == "Flatten"
    assert step.attributes["features"] in {6, -1}


@pytest.mark.parametrize(
    ("shape", "allowzero"), [([32, 6], 0), ([0, 6], 1), ([-1, 2, 3], 0), ([6, -1], 0)]
)
def test_reshape_that_does_not_flatten(shape: list[int], allowzero: int) -> None:
    nodes = [node("Reshape", "x s", "y", allowzero=allowzero)]
    chain = read_chain(graph(nodes, {"s": np.array(shape)}, ("batch", 2, 3)))
    assert [step.operator for step in chain.steps] == ["Reshape"]


def problems_of(nodes: list[onnx.NodeProto], **tensors: Any) -> str:
    return "; ".join(read_chain(graph(nodes, {"w": W, "b": B} | tensors)).problems)


def linear(value: str = "x", output: str = "y") -> onnx.NodeProto:
    return node("Gemm", f"{value} w b", output, transB=1)


class TestNotAChain:
    def test_value_read_twice(self) -> None:
        nodes = [linear(output="z"), node("Relu", "z", "r"), node("Add", "r z", "y")]
        assert "node 2 (Add) reads ['r', 'z'], expected ['r']" in problems_of(nodes)

    def test_value_in_another_place(self) -> None:
        assert "reads ['x'], expected ['x'] alone and first" in problems_of(
            [node("Sub", "b x", "y")], w=W[0]
        )

    def test_output_from_the_middle(self) -> None:
        nodes = [linear(), node("Softmax", "y", "p")]
        assert "the last operator writes 'p', outputs are ['y']" in problems_of(nodes)

    def test_tensor_that_nothing_reads(self) -> None:
        assert "stored or computed, but not used: old" in problems_of([linear()], old=W)

    def test_tensor_that_only_an_unused_node_reads(self) -> None:
        nodes = [node("Identity", "old", "dead"), linear()]
        assert "not used: dead, old" in problems_of(nodes, old=W)

    def test_second_output(self) -> None:
        nodes = [linear(output="z"), helper.make_node("Dropout", ["z"], ["y", "mask"])]
        assert "node 1 (Dropout) has 2 outputs, expected 1" in problems_of(nodes)

    def test_operator_of_another_domain(self) -> None:
        nodes = [node("Gemm", "x w b", "y", transB=1, domain="com.example")]
        assert "not of ONNX's own but com.example" in problems_of(nodes)

    def test_constant_that_would_fill_the_memory(self) -> None:
        nodes = [node("Expand", "b n", "e"), node("Gemm", "x w e", "y", transB=1)]
        chain = read_chain(graph(nodes, {"w": W, "b": B[:1], "n": np.array([2**40, 2])}))
        assert chain.problems

    def test_weights_that_the_graph_computes(self) -> None:
        nodes = [node("Mul", "w c", "v"), node("Gemm", "x v b", "y", transB=1)]
        chain = read_chain(graph(nodes, {"w": W, "b": B, "c": np.float32(1)}))
        assert chain.problems


def test_attributes_have_their_defaults() -> None:
    nodes = [node("BatchNormalization", "x g b m v", "y")]
    four = {name: np.ones(3, np.float32) for name in "gbmv"}
    chain: Chain = read_chain(graph(nodes, four, output=("batch", 3)))
    (step,) = chain.steps
    assert step.attributes == {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0}


def test_dropout_in_training_mode_is_a_step() -> None:
    nodes = [linear(output="z"), node("Dropout", "z ratio on", "y")]
    tensors = {"w": W, "b": B, "ratio": np.float32(0.5), "on": np.array(True)}
    assert [step.operator for step in read_chain(graph(nodes, tensors)).steps] == [
        "Linear",
        "Dropout",
    ]


def test_unknown_field() -> None:
    content = graph([linear()], {"w": W, "b": B}).SerializeToString() + b"\xfa\x3f\x03old"
    proto = decode(content)
    assert isinstance(proto, onnx.ModelProto)
    assert "1 fields that are not ONNX's" in file_problems(proto)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "the file is empty"), (b"\x08\x0a", "holds no graph"), (b"\xff", "not an ONNX file")],
)
def test_invalid_bytes(content: bytes, problem: str) -> None:
    found = decode(content)
    assert isinstance(found, str)
    assert problem in found


def test_external_data_is_not_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    proto = graph([linear()], {"w": W, "b": B})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "w.bin"
    assert "weights outside the file: w" in file_problems(proto)
    assert "w" not in read_chain(proto).stored
