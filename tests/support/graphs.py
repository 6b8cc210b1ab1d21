"""ONNX files of the batch-norm network, built node by node: the exporter would take ten seconds."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mnist_batchnorm.core import paths as layout
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.parity.weights import fold
from tests.conftest import ROOT

REGRESSION = ROOT / "tests/fixtures/regression"
EPS = load_checkpoint(REGRESSION / "checkpoint.safetensors").architecture.bn_eps

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """What the ONNX files of a test are built from.

    Attributes:
        state: the checkpoint's arrays.
        weights_sha256: what the files say about their origin.
        batch: the batch axis, symbolic or frozen.
        training_mode: of the BatchNormalization nodes that are kept.
    """

    state: State
    weights_sha256: str = "a" * 64
    batch: str | int = "batch"
    training_mode: int = 0

    def graph(self, folded: bool) -> bytes:
        """Build an ONNX file."""
        nodes, tensors, value = [], [], "image"
        for i in (1, 2, 3):
            weight, bias = self.state[f"linear{i}.weight"], self.state[f"linear{i}.bias"]
            if folded and i < 3:
                linear, norm = (
                    {
                        key.partition(".")[2]: value
                        for key, value in self.state.items()
                        if key.startswith(f"{layer}{i}.")
                    }
                    for layer in ("linear", "bn")
                )
                (weight, _), (bias, _) = fold(linear, norm, EPS)
            names = [f"linear{i}.weight", f"linear{i}.bias"]
            tensors += [
                numpy_helper.from_array(array.astype(np.float32), name)
                for array, name in zip((weight, bias), names, strict=True)
            ]
            output = f"z{i}" if i < 3 else "logits"
            nodes.append(helper.make_node("Gemm", [value, *names], [output], transB=1))
            value = output
            if i < 3 and not folded:
                names = [f"bn{i}.{k}" for k in ("weight", "bias", "running_mean", "running_var")]
                tensors += [numpy_helper.from_array(self.state[name], name) for name in names]
                outputs = [f"y{i}", *([f"mean{i}", f"var{i}"] if self.training_mode else [])]
                nodes.append(
                    helper.make_node(
                        "BatchNormalization",
                        [value, *names],
                        outputs,
                        epsilon=EPS,
                        training_mode=self.training_mode,
                    )
                )
                value = f"y{i}"
            if i < 3:
                nodes.append(helper.make_node("Relu", [value], [f"x{i}"]))
                value = f"x{i}"
        proto = helper.make_model(
            helper.make_graph(
                nodes,
                "main",
                [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self.batch, 784])],
                [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [self.batch, 10])],
                tensors,
            ),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        helper.set_model_props(proto, {layout.WEIGHTS_KEY: self.weights_sha256})
        onnx.checker.check_model(proto, full_check=True)
        content: bytes = proto.SerializeToString()
        return content

    def write(self) -> None:
        """Write both graphs where the pipeline does."""
        for name in layout.REGISTERED.values():
            path = layout.MODELS / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.graph(folded=layout.GRAPHS[name].folded))

    def write_plain(self, shift: float = 0.25) -> None:
        """Write plain.onnx, and what stands for its checkpoint, where the pipeline does.

        Gemm and ReLU as in a folded graph, with a score of its own for 3.
        """
        bias = self.state["linear3.bias"].copy()
        bias[3] += shift
        plain = replace(self, state=self.state | {"linear3.bias": bias}, weights_sha256="c" * 64)
        layout.MODELS.mkdir(exist_ok=True)
        (layout.MODELS / "plain.onnx").write_bytes(plain.graph(folded=True))
        layout.CHECKPOINTS["plain"].write_bytes(bias.tobytes())


def arrays_of(network: torch.nn.Module) -> State:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
