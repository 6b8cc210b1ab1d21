"""Inputs, outputs, batch axis, and what else a file carries beside its network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.helper import (
    make_function,
    make_graph,
    make_node,
    make_opsetid,
    make_tensor_sequence_value_info,
    make_tensor_value_info,
)

from tests.support.mutants.edit import (
    after,
    at_input,
    at_output,
    constants,
    drop_unused,
    line,
    nodes,
    numbers,
    put,
    tensor,
    weight_names,
    writer,
)
from tests.support.mutants.table import FILE, Bad, Family
from tests.support.parity_cases import INPUT, NETWORKS, OPSET, OUTPUT, Case, dynamo_export

batch = Family("batch axis")
mutant = Family("interface")
external = Family("external data")
hidden = Family("hidden content")

FLOAT, DOUBLE, HALF, UINT8, INT64 = (
    onnx.TensorProto.DataType.Value(n) for n in ("FLOAT", "DOUBLE", "FLOAT16", "UINT8", "INT64")
)


# --- batch axis ---------------------------------------------------------------------------------


@batch("frozen-batch")
def frozen_at_32(case: Case) -> Bad:
    """torch.onnx.export without dynamic_shapes."""
    return dynamo_export(case.model, case.inputs, fold=False, batch=32)


@batch("frozen-batch")
def frozen_at_1(case: Case) -> Bad:
    """The same with one example image."""
    graph = case.folded()
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return graph


@batch("frozen-batch")
def frozen_input(case: Case) -> Bad:
    """A deployment tool that fixed the input's shape and left the output's."""
    graph = case.kept()
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    return graph


@batch("frozen-batch", latent=True)
def frozen_output(case: Case) -> Bad:
    """The output's shape only: ONNX Runtime warns, other runtimes allocate 32 rows."""
    graph = case.kept()
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 32
    return graph


def reshaped(case: Case, shape: list[int]) -> Bad:
    graph = constants(case.kept(), rows=shape)
    return after(graph, writer(graph, writer(graph, OUTPUT).input[0]), line(("Reshape", "rows")))


@batch("frozen-batch")
def frozen_inside(case: Case) -> Bad:
    """x.view(32, -1): the interface promises any batch size, a Reshape inside takes 32."""
    return reshaped(case, [32, -1])


@batch("wiring")
def reshaped_to_the_width(case: Case) -> Bad:
    """x.view(-1, 2 * width): two rows become one, and no shape says so."""
    graph = constants(case.folded(), pairs=[-1, 2, 10], axis=[1])
    return at_output(graph, line(("Reshape", "pairs"), ("ReduceMax", "axis", {"keepdims": 0})))


@batch("frozen-batch")
def only_32_rows(case: Case) -> Bad:
    """A static buffer of 32 rows: what is beyond is dropped silently."""
    graph = constants(case.kept(), none=[0], most=[32], axis=[0])
    return at_output(graph, line(("Slice", "none", "most", "axis")))


@batch("coupled-rows")
def averaged_over_the_batch(case: Case) -> Bad:
    """Test-time augmentation: all rows are one image's crops, and get one answer."""
    graph = constants(case.folded(), rows=[0])
    graph = at_output(graph, line(("ReduceMean", "rows", {"keepdims": 1})))
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return graph


@batch("interface")
def batch_last(case: Case) -> Bad:
    """Time-major, column-major: the batch is the input's last axis."""
    shape = NETWORKS[case.name][1]
    graph = case.folded()
    axes = len(shape)
    at_input(graph, line(("Transpose", {"perm": [axes, *range(axes)]})))
    graph.graph.input[0].CopyFrom(make_tensor_value_info(INPUT, FLOAT, [*shape, "batch"]))
    return graph


@batch("frozen-batch", latent=True)
def value_info_frozen(case: Case) -> Bad:
    """Shapes inferred at batch 32 are still noted inside: memory planners trust them."""
    graph = case.kept()
    inner = nodes(graph, "Relu")[0].output[0]
    (value,) = (v for v in graph.graph.value_info if v.name == inner)
    value.type.tensor_type.shape.dim[0].dim_value = 32
    return graph


# --- inputs and outputs -------------------------------------------------------------------------


@mutant("interface")
def input_renamed(case: Case) -> Bad:
    """The exporter's own name for the first input."""
    graph = case.kept()
    graph.graph.input[0].name = "input.1"
    for node in graph.graph.node:
        node.input[:] = ["input.1" if name == INPUT else name for name in node.input]
    return graph


@mutant("interface")
def output_renamed(case: Case) -> Bad:
    """The exporter's own name for the last output."""
    graph = case.folded()
    graph.graph.output[0].name = writer(graph, OUTPUT).output[0] = "19"
    return graph


@mutant("interface")
def features_as_a_second_output(case: Case) -> Bad:
    """A tap for debugging."""
    graph = case.kept()
    features = writer(graph, OUTPUT).input[0]
    graph.graph.output.append(make_tensor_value_info(features, FLOAT, ["batch", None]))
    return graph


@mutant("interface")
def classes_as_a_second_output(case: Case) -> Bad:
    """The digit beside the logits."""
    graph = case.folded()
    graph.graph.node.append(make_node("ArgMax", [OUTPUT], ["digit"], axis=1, keepdims=0))
    graph.graph.output.append(make_tensor_value_info("digit", INT64, ["batch"]))
    return graph


@mutant("interface")
def second_input(case: Case) -> Bad:
    """An attention mask from the template: required, and never read."""
    graph = case.kept()
    graph.graph.input.append(make_tensor_value_info("mask", FLOAT, ["batch"]))
    return graph


@mutant("interface", latent=True)
def weight_that_callers_may_override(case: Case) -> Bad:
    """An initializer that is an input as well: whoever feeds its name replaces the weight."""
    graph = case.kept()
    stored = tensor(graph, case.largest)
    graph.graph.input.append(make_tensor_value_info(stored.name, FLOAT, list(stored.dims)))
    return graph


@mutant("interface", latent=True)
def all_weights_as_inputs(case: Case) -> Bad:
    """keep_initializers_as_inputs=True, which IR version 3 demanded."""
    graph = case.legacy()
    for stored in graph.graph.initializer:
        value = make_tensor_value_info(stored.name, stored.data_type, list(stored.dims))
        graph.graph.input.append(value)
    return graph


def of_type(case: Case, element: int, end: str) -> Bad:
    graph = case.kept()
    value = graph.graph.input[0] if end == INPUT else graph.graph.output[0]
    if end == INPUT:
        at_input(graph, line(("Cast", {"to": FLOAT})))
    else:
        at_output(graph, line(("Cast", {"to": element})))
    value.type.tensor_type.elem_type = element
    return graph


for label, element, end, story in (
    ("input_float64", DOUBLE, INPUT, "NumPy's default type."),
    ("input_float16", HALF, INPUT, "Half on the wire, at the interface."),
    ("input_uint8", UINT8, INPUT, "Pixels as they come, and nobody divides them by 255."),
    ("output_float64", DOUBLE, OUTPUT, "A client in Java."),
    ("output_float16", HALF, OUTPUT, "Logits in half."),
    ("output_int64", INT64, OUTPUT, "Logits cut to whole numbers."),
):
    mutant.add(label, "interface", story, partial(of_type, element=element, end=end))


@mutant("interface")
def another_rank(case: Case) -> Bad:
    """Images as [n, 784] for a network of [n, 1, 28, 28], and the other way round."""
    shape = NETWORKS[case.name][1]
    other: list[Any] = [1, 28, 28] if shape == (784,) else [784]
    graph = constants(case.folded(), wanted=[-1, *shape])
    at_input(graph, line(("Reshape", "wanted")))
    graph.graph.input[0].CopyFrom(make_tensor_value_info(INPUT, FLOAT, ["batch", *other]))
    return graph


@mutant("interface")
def no_batch_axis(case: Case) -> Bad:
    """One image in, one row out: for a phone."""
    shape = NETWORKS[case.name][1]
    graph = constants(case.folded(), axis=[0])
    at_input(graph, line(("Unsqueeze", "axis")))
    at_output(graph, line(("Squeeze", "axis")))
    graph.graph.input[0].CopyFrom(make_tensor_value_info(INPUT, FLOAT, shape))
    graph.graph.output[0].CopyFrom(make_tensor_value_info(OUTPUT, FLOAT, [10]))
    return graph


@mutant("interface", latent=True)
def symbolic_width(case: Case) -> Bad:
    """Every axis made dynamic, to be on the safe side: the contract of 784 pixels is gone."""
    graph = case.kept()
    graph.graph.input[0].type.tensor_type.shape.dim[-1].dim_param = "width"
    del graph.graph.value_info[:]
    return graph


@mutant("interface")
def sequence_output(case: Case) -> Bad:
    """A list of one tensor, as scikit-learn's converters return theirs."""
    graph = at_output(case.folded(), line(("SequenceConstruct",)))
    graph.graph.output[0].CopyFrom(make_tensor_sequence_value_info(OUTPUT, FLOAT, None))
    return graph


@mutant("interface")
def eleven_classes(case: Case) -> Bad:
    """A background class that has weight 0 and a low bias."""
    graph = case.folded()
    weight, bias = (f"{case.linear[-1]}.{name}" for name in ("weight", "bias"))
    put(graph, weight, np.pad(numbers(graph, weight), ((0, 1), (0, 0))))
    put(graph, bias, np.append(numbers(graph, bias), np.float32(-100)))
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
    del graph.graph.value_info[:]
    return graph


# --- external data ------------------------------------------------------------------------------

DATA = "model.onnx.data"


def outside(
    case: Case, content: Callable[[bytes], bytes] | None, location: str = DATA
) -> dict[str, bytes]:
    """Move the largest weight to another file."""
    graph = case.kept()
    stored = tensor(graph, case.largest)
    raw = numpy_helper.to_array(stored).tobytes()
    stored.ClearField("raw_data")
    stored.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(len(raw))}.items():
        entry = stored.external_data.add()
        entry.key, entry.value = key, value
    files = {FILE: graph.SerializeToString()}
    return files | ({location: content(raw)} if content else {})


@external("external-data")
def data_missing(case: Case) -> Bad:
    """Only the .onnx was uploaded."""
    return outside(case, None)


@external("external-data")
def data_stale(case: Case) -> Bad:
    """The .onnx is new, the data beside it the last release's."""
    return outside(case, lambda _: case.earlier[case.largest].numpy().tobytes())


@external("external-data", latent=True)
def data_present(case: Case) -> Bad:
    """Two files where one was promised: whoever copies one has half a model."""
    return outside(case, lambda raw: raw)


@external("external-data")
def data_truncated(case: Case) -> Bad:
    """The data's upload broke off."""
    return outside(case, lambda raw: raw[:-4096])


@external("external-data")
def data_shifted(case: Case) -> Bad:
    """A header in the data file that no offset accounts for."""
    return outside(case, lambda raw: b"\0\0\0\0" + raw[:-4])


@external("external-data")
def data_elsewhere(case: Case) -> Bad:
    """The location is a path of the machine that exported."""
    return outside(case, None, "../build/model.onnx.data")


# --- what nobody reads --------------------------------------------------------------------------


@hidden("hidden-content", latent=True)
def stale_weights_beside(case: Case) -> Bad:
    """The weights of before fine-tuning are still in the file, unused."""
    graph = case.kept()
    for name in weight_names(graph):
        put(graph, f"{name}.orig", case.earlier[name].numpy())
    return graph


@hidden("hidden-content", latent=True)
def unused_branch(case: Case) -> Bad:
    """An auxiliary head whose result goes nowhere."""
    graph = case.folded()
    graph.graph.node.append(make_node("Softmax", [OUTPUT], ["auxiliary"], axis=1))
    return graph


@hidden("hidden-content", latent=True)
def unused_function(case: Case) -> Bad:
    """A model-local function that nothing calls."""
    graph = case.kept()
    body = [make_node("Relu", ["x"], ["y"])]
    graph.functions.append(
        make_function("pkg.layers", "Old", ["x"], ["y"], body, [make_opsetid("", OPSET)])
    )
    graph.opset_import.append(make_opsetid("pkg.layers", 1))
    return graph


@hidden("hidden-content", latent=True)
def function_in_place_of_an_operator(case: Case) -> Bad:
    """export_modules_as_functions: the network is not in the graph but in the functions."""
    graph = case.folded()
    body = [make_node("Relu", ["x"], ["y"])]
    graph.functions.append(
        make_function("pkg.layers", "Relu", ["x"], ["y"], body, [make_opsetid("", OPSET)])
    )
    graph.opset_import.append(make_opsetid("pkg.layers", 1))
    for node in nodes(graph, "Relu"):
        node.domain = "pkg.layers"
    return graph


@hidden("hidden-content")
def function_that_redefines_relu(case: Case) -> Bad:
    """The same, and the function leaks."""
    graph = case.folded()
    body = [make_node("LeakyRelu", ["x"], ["y"], alpha=0.001)]
    graph.functions.append(
        make_function("pkg.layers", "Relu", ["x"], ["y"], body, [make_opsetid("", OPSET)])
    )
    graph.opset_import.append(make_opsetid("pkg.layers", 1))
    nodes(graph, "Relu")[0].domain = "pkg.layers"
    return graph


@hidden("hidden-content")
def operator_of_one_runtime(case: Case) -> Bad:
    """com.microsoft's FusedGemm, out of a session's optimized_model_filepath."""
    graph = case.folded()
    gemm = writer(graph, OUTPUT)
    gemm.op_type, gemm.domain = "FusedGemm", "com.microsoft"
    gemm.attribute.append(onnx.helper.make_attribute("activation", "LeakyRelu"))
    gemm.attribute.append(onnx.helper.make_attribute("activation_alpha", 0.999))
    graph.opset_import.append(make_opsetid("com.microsoft", 1))
    return graph


@hidden("hidden-content")
def operator_of_nobody(case: Case) -> Bad:
    """A plugin that only the training cluster has."""
    graph = case.kept()
    nodes(graph, "Relu")[0].domain = "com.example.ops"
    graph.opset_import.append(make_opsetid("com.example.ops", 1))
    return graph


@hidden("hidden-content", latent=True)
def training_graph(case: Case) -> Bad:
    """training_info: a loss and its gradients for on-device training."""
    graph = case.kept()
    info = graph.training_info.add()
    info.algorithm.CopyFrom(make_graph([], "step", [], []))
    return graph


@hidden("hidden-content", latent=True)
def unknown_fields(case: Case) -> Bad:
    """A vendor's extension of the format: field 400, which no reader of ONNX knows."""
    return case.kept().SerializeToString() + bytes([0x82, 0x19, 5]) + b"cache"


@hidden("hidden-content", latent=True)
def weight_stored_sparse(case: Case) -> Bad:
    """A pruning tool stores weights as indices and values, which few readers look at."""
    graph = case.kept()
    dense = numbers(graph, case.largest)
    tensor(graph, case.largest).name = "dense"
    drop_unused(graph)
    at = np.flatnonzero(dense)
    sparse = onnx.helper.make_sparse_tensor(
        numpy_helper.from_array(dense.reshape(-1)[at], case.largest),
        numpy_helper.from_array(at, f"{case.largest}.indices"),
        list(dense.shape),
    )
    graph.graph.sparse_initializer.append(sparse)
    return graph
