"""The edits of a graph that the mutants are made of."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from onnx.helper import make_node

from tests.support.parity_cases import INPUT, OUTPUT, Case, State

Array = npt.NDArray[Any]

MIDDLE = (5, 0.52)  # a unit, and how far along its inputs: a pixel that most digits ink


# --- numbers ------------------------------------------------------------------------------------


def tensor(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = (t for t in graph.graph.initializer if t.name == name)
    return found


def numbers(graph: onnx.ModelProto, name: str) -> Array:
    """A copy of what an initializer holds."""
    array: Array = numpy_helper.to_array(tensor(graph, name)).copy()
    return array


def put(graph: onnx.ModelProto, name: str, array: npt.ArrayLike) -> None:
    """Replace what an initializer holds, or add one."""
    known = [t for t in graph.graph.initializer if t.name == name]
    stored = known[0] if known else graph.graph.initializer.add()
    stored.CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), name))


def change(graph: onnx.ModelProto, name: str, how: Callable[[Array], Array]) -> onnx.ModelProto:
    """Replace what an initializer holds by a function of it, in its own type."""
    before = numbers(graph, name)
    put(graph, name, np.asarray(how(before)).astype(before.dtype))
    return graph


def with_state(graph: onnx.ModelProto, state: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """Give a graph that keeps its batch norm other weights and statistics."""
    for stored in list(graph.graph.initializer):
        if stored.name in state:
            put(graph, stored.name, state[stored.name].numpy())
    return graph


def every_weight(graph: onnx.ModelProto, how: Callable[[Array], Array]) -> onnx.ModelProto:
    """Change the weights of all Gemm and Conv nodes."""
    for name in weight_names(graph):
        change(graph, name, how)
    return graph


def every_number(graph: onnx.ModelProto, how: Callable[[Array], Array]) -> onnx.ModelProto:
    """Change all float initializers."""
    for stored in list(graph.graph.initializer):
        if stored.data_type == onnx.TensorProto.FLOAT:
            change(graph, stored.name, how)
    return graph


def weight_names(graph: onnx.ModelProto) -> list[str]:
    return [node.input[1] for node in graph.graph.node if node.op_type in {"Gemm", "Conv"}]


def bias_name(graph: onnx.ModelProto, weight: str) -> str:
    """The bias of the Gemm or Conv that has this weight."""
    (found,) = (node for node in graph.graph.node if list(node.input[1:2]) == [weight])
    return str(found.input[2])


def middle(array: Array) -> tuple[int, ...]:
    """One weight of a unit in use, by its index."""
    unit, place = MIDDLE
    flat = int(array[0].size * place)
    return (unit, *(int(i) for i in np.unravel_index(flat, array.shape[1:])))


def change_one(graph: onnx.ModelProto, name: str, how: Callable[[Any], Any]) -> onnx.ModelProto:
    """Change one number of an initializer."""

    def one(array: Array) -> Array:
        index = middle(array)
        array[index] = how(array[index])
        return array

    return change(graph, name, one)


def flip(bit: int) -> Callable[[np.float32], Array]:
    """Flip a bit of a float32: 0 the last of the mantissa, 23-30 the exponent, 31 the sign."""

    def flipped(value: np.float32) -> Array:
        return np.asarray(np.asarray(value).view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32)

    return flipped


def forwards(
    case: Case, batches: int, momentum: float | None = 0.1, inputs: Array | None = None
) -> State:
    """What statistics become after forwards of some test images in train mode.

    Args:
        case: the network.
        batches: how many, of 32 images each.
        momentum: of the forwards; None averages them and forgets what was before.
        inputs: in place of the test images.
    """
    model = case.model_with(case.state).train()
    images = torch.from_numpy(case.inputs if inputs is None else inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.momentum = momentum
            if momentum is None:
                module.reset_running_stats()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CNN's Dropout draws
        for i in range(batches):
            model(images[32 * i : 32 * (i + 1)])
    return dict(model.state_dict())


# --- nodes --------------------------------------------------------------------------------------


def nodes(graph: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    found = [node for node in graph.graph.node if node.op_type == operator]
    assert found, operator
    return found


def writer(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node that writes a tensor."""
    (found,) = (node for node in graph.graph.node if name in node.output)
    return found


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def become(node: onnx.NodeProto, operator: str, *constants: str, **attributes: Any) -> None:
    """Make a node of one input another operator."""
    node.op_type = operator
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())
    node.input[:] = [node.input[0], *constants]


def line(*steps: tuple[Any, ...]) -> list[onnx.NodeProto]:
    """Nodes one after the other: (operator, further inputs ..., attributes if any) each."""
    made = []
    for i, (operator, *further) in enumerate(steps):
        attributes = further.pop() if further and isinstance(further[-1], dict) else {}
        source = "in" if i == 0 else f"step{i}"
        target = "out" if i == len(steps) - 1 else f"step{i + 1}"
        made.append(make_node(operator, [source, *further], [target], **attributes))
    return made


def at_input(graph: onnx.ModelProto, new: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Put nodes before the network: they read ``in``, and it reads their ``out``."""
    for node in graph.graph.node:
        node.input[:] = ["prepared" if name == INPUT else name for name in node.input]
    _arrange(graph, [*_renamed(new, INPUT, "prepared"), *graph.graph.node])
    return graph


def at_output(graph: onnx.ModelProto, new: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Put nodes after the network: they read the logits as ``in``, and ``out`` are the new."""
    return after(graph, writer(graph, OUTPUT), new)


def in_place_of(
    graph: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]
) -> onnx.ModelProto:
    """Put nodes where another was: ``in`` is what it read first, ``out`` what it wrote."""
    before = list(graph.graph.node)
    at = before.index(node)
    new = _renamed(new, node.input[0], node.output[0])
    _arrange(graph, [*before[:at], *new, *before[at + 1 :]])
    return drop_unused(graph)


def after(
    graph: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]
) -> onnx.ModelProto:
    """Put nodes after another: they read its output as ``in``; ``out`` is in its place."""
    before = list(graph.graph.node)
    at = before.index(node)
    written = node.output[0]
    before[at].output[0] = "raw"
    _arrange(graph, [*before[: at + 1], *_renamed(new, "raw", written), *before[at + 1 :]])
    return graph


def _renamed(new: list[onnx.NodeProto], source: str, target: str) -> list[onnx.NodeProto]:
    names = {"in": source, "out": target}
    for node in new:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return new


def remove(graph: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto:
    """Take a node out: who read what it wrote reads what it read."""
    for reader in graph.graph.node:
        reader.input[:] = [node.input[0] if n == node.output[0] else n for n in reader.input]
    if node.output[0] == graph.graph.output[0].name:
        writer(graph, node.input[0]).output[0] = node.output[0]
    _arrange(graph, [n for n in graph.graph.node if n != node])
    return drop_unused(graph)


def _arrange(graph: onnx.ModelProto, order: list[onnx.NodeProto]) -> None:
    arranged = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
    del graph.graph.node[:]
    graph.graph.node.extend(arranged)
    del graph.graph.value_info[:]  # the shapes of a graph that is no more


def drop_unused(graph: onnx.ModelProto) -> onnx.ModelProto:
    read = {name for node in graph.graph.node for name in node.input}
    kept = [t for t in graph.graph.initializer if t.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    del graph.graph.value_info[:]  # which names initializers too
    return graph


def constants(graph: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    """Add initializers; floats as float32, whole numbers as int64."""
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        put(graph, name, array)
    return graph
