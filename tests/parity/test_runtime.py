import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mnist_batchnorm.parity.runtime import (
    LEVELS,
    Level,
    Passes,
    RuntimeFailedError,
    Session,
    load,
)
from tests.support.parity_networks import append, mlp, to_onnx

INPUTS = np.random.default_rng(0).normal(size=(10, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return to_onnx(mlp(), (12,))


@pytest.fixture(scope="module")
def content(graph: onnx.ModelProto) -> bytes:
    serialized: bytes = graph.SerializeToString()
    return serialized


class TestLoad:
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("threads", [1, 2])
    def test_runs_at_every_level(self, content: bytes, level: Level, threads: int) -> None:
        outputs = load(content, level, threads).run(INPUTS)
        assert outputs.shape == (10, 4)
        assert outputs.dtype == np.float32

    def test_reads_the_files_metadata(self, graph: onnx.ModelProto) -> None:
        changed = append(graph, helper.make_node("Identity", ["y"], ["z"]))
        helper.set_model_props(changed, {"made by": "me"})
        assert load(changed.SerializeToString()).metadata == {"made by": "me"}

    @pytest.mark.parametrize("content", [b"", b"no model", b"\x08"])
    def test_of_something_else_is_one_quiet_line(
        self, content: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(RuntimeFailedError, match=r"^ONNX Runtime cannot load it: .+$"):
            load(content)
        assert capfd.readouterr() == ("", "")

    def test_of_half_a_file(self, content: bytes) -> None:
        with pytest.raises(RuntimeFailedError, match="cannot load it"):
            load(content[: len(content) // 2])

    def test_refuses_a_second_input(self, graph: onnx.ModelProto) -> None:
        changed = append(graph, helper.make_node("Add", ["y", "more"], ["z"]))
        more = helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 4])
        changed.graph.input.append(more)
        with pytest.raises(RuntimeFailedError, match=r"takes 2 inputs \(x, more\)"):
            load(changed.SerializeToString())

    def test_takes_an_input_with_a_default_for_none(self, graph: onnx.ModelProto) -> None:
        changed = append(graph, helper.make_node("Add", ["y", "more"], ["z"]), more=np.float32(1))
        more = helper.make_tensor_value_info("more", TensorProto.FLOAT, [])
        changed.graph.input.append(more)
        assert load(changed.SerializeToString()).input == "x"

    def test_reads_the_first_of_two_outputs(self, graph: onnx.ModelProto) -> None:
        changed = append(graph, helper.make_node("Neg", ["y"], ["z"]))
        changed.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
        session = load(changed.SerializeToString())
        assert session.output == "z"
        assert session.run(INPUTS).shape == (10, 4)


class TestRun:
    def test_in_batches_equals_at_once(self, content: bytes) -> None:
        session = load(content)
        for batch_size in (1, 3, 10, 100):
            together = session.run_in_batches(INPUTS, batch_size)
            np.testing.assert_array_equal(together, session.run(INPUTS))

    def test_of_no_inputs(self, content: bytes) -> None:
        assert load(content).run_in_batches(INPUTS[:0], 7).shape == (0, 4)

    def test_of_a_frozen_batch_axis(
        self, graph: onnx.ModelProto, capfd: pytest.CaptureFixture[str]
    ) -> None:
        changed = append(graph, helper.make_node("Identity", ["y"], ["z"]))
        changed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        session = load(changed.SerializeToString())
        assert session.run(INPUTS[:3]).shape == (3, 4)
        with pytest.raises(RuntimeFailedError, match=r"invalid dimensions.*Got: 10 Expected: 3"):
            session.run(INPUTS)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            (helper.make_node("ReduceMax", ["y"], ["z"], keepdims=0), r"shape \(\) for a batch"),
            (helper.make_node("Transpose", ["y"], ["z"]), r"shape \(4, 10\) for a batch of 10"),
            (helper.make_node("SequenceConstruct", ["y"], ["z"]), "no tensor but a list"),
        ],
    )
    def test_wants_a_row_for_each_input(
        self, graph: onnx.ModelProto, node: onnx.NodeProto, message: str
    ) -> None:
        changed = append(graph, node)
        if node.op_type == "SequenceConstruct":
            sequence = helper.make_tensor_sequence_value_info("z", TensorProto.FLOAT, None)
            changed.graph.output[0].CopyFrom(sequence)
        elif node.op_type == "ReduceMax":
            changed.graph.output[0].type.tensor_type.shape.SetInParent()
        with pytest.raises(RuntimeFailedError, match=message):
            load(changed.SerializeToString()).run(INPUTS)

    def test_wants_rows_of_one_kind(self, graph: onnx.ModelProto) -> None:
        """The mean over the batch, padded with as many zeros as the batch is long."""
        nodes = [
            helper.make_node("Shape", ["y"], ["sizes"], end=1),
            helper.make_node("Concat", ["none", "none", "none", "sizes"], ["pads"], axis=0),
            helper.make_node("Pad", ["y", "pads"], ["z"]),
        ]
        changed = append(graph, *nodes, none=np.zeros(1, np.int64))
        session = load(changed.SerializeToString())
        assert session.run(INPUTS).shape == (10, 14)
        with pytest.raises(RuntimeFailedError, match=r"rows of float32 \(11,\) and of .* \(7,\)"):
            session.run_in_batches(INPUTS, 7)


class TestPasses:
    def test_run_once_each(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        batches: list[int] = []
        run = Session.run

        def count(session: Session, batch: np.ndarray) -> np.ndarray:
            batches.append(len(batch))
            return run(session, batch)

        monkeypatch.setattr(Session, "run", count)
        passes = Passes(content)
        for _ in range(2):
            passes.run("some", INPUTS)
            passes.run("others", INPUTS[:3])
            passes.run("others", INPUTS[:3], "disabled")
        assert batches == [10, 3, 3]

    def test_sessions_are_kept(self, content: bytes) -> None:
        passes = Passes(content)
        assert passes.session("all") is passes.session("all", 1)
        assert passes.session("all") is not passes.session("basic")
        assert passes.session("all") is not passes.session("all", 2)

    def test_fails_each_time(self) -> None:
        passes = Passes(b"no model")
        for _ in range(2):
            with pytest.raises(RuntimeFailedError, match="cannot load it"):
                passes.run("some", INPUTS)
