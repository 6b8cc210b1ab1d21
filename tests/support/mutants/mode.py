"""Layers that still train, or that judge a row by the rows beside it."""

import onnx
from onnx.helper import make_node, make_tensor_value_info
from torch.onnx import TrainingMode

from tests.support.mutants.edit import (
    after,
    at_input,
    at_output,
    constants,
    in_place_of,
    line,
    nodes,
    set_attribute,
    writer,
)
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import OUTPUT, Case, legacy_export

mutant = Family("mode")


@mutant("training-mode")
def exported_while_training(case: Case) -> Bad:
    """The training loop's last mode, which TrainingMode.TRAINING keeps: batch statistics."""
    return legacy_export(case.model_with(case.state), case.inputs, TrainingMode.TRAINING)


@mutant("training-mode")
def one_layer_left_training(case: Case) -> Bad:
    """One block was fine-tuned, and only the others were put back into eval mode."""
    model = case.model_with(case.state)
    model.get_submodule("bn2").train()
    return legacy_export(model, case.inputs, TrainingMode.PRESERVE)


@mutant("training-mode")
def training_mode_set(case: Case) -> Bad:
    """A tool for on-device training set training_mode=1 on a graph exported in eval mode."""
    graph = case.kept()
    for node in nodes(graph, "BatchNormalization"):
        set_attribute(node, "training_mode", 1)
        node.output.extend(f"{node.output[0]}_{name}" for name in ("mean", "var"))
    return graph


@mutant("training-mode")
def training_outputs_of_opset_13(case: Case) -> Bad:
    """A converter from before opset 14, whose batch norm trains when it has five outputs."""
    graph = case.legacy()
    graph.opset_import[0].version = 13
    for i, node in enumerate(nodes(graph, "BatchNormalization")):
        kept = [a for a in node.attribute if a.name != "training_mode"]  # as of opset 14
        del node.attribute[:]
        node.attribute.extend(kept)
        node.output.extend(f"{name}{i}" for name in ("mean", "var", "saved_mean", "saved_var"))
    return graph


# ONNX Runtime's CPU build for inference reads every Dropout as Identity; other runtimes obey it
@mutant("active-dropout", latent=True)
def dropout_while_training(case: Case) -> Bad:
    """A Dropout node told to train: a fifth of the units is off at each call."""
    graph = case.kept()
    constants(graph, ratio=0.2, training=True)
    return after(graph, nodes(graph, "Relu")[0], line(("Dropout", "ratio", "training")))


@mutant("active-dropout", latent=True)
def monte_carlo_dropout(case: Case) -> Bad:
    """Dropout kept on to estimate uncertainty, in the notebook that also exported the model."""
    graph = case.folded()
    constants(graph, ratio=0.05, training=True)
    hidden = writer(graph, writer(graph, OUTPUT).input[0])
    return after(graph, hidden, line(("Dropout", "ratio", "training")))


@mutant("random")
def dropout_written_out(case: Case) -> Bad:
    """A converter spelt a training Dropout in random numbers, which every runtime obeys."""
    graph = constants(case.folded(), ratio=0.05, nothing=0.0)
    new = [
        make_node("RandomUniformLike", ["in"], ["draw"]),
        make_node("Less", ["draw", "ratio"], ["off"]),
        make_node("Where", ["off", "nothing", "in"], ["out"]),
    ]
    return after(graph, writer(graph, writer(graph, OUTPUT).input[0]), new)


@mutant("random")
def noise_on_the_activations(case: Case) -> Bad:
    """A GaussianNoise layer that regularized training stayed in."""
    graph = case.kept()
    new = [
        make_node("RandomNormalLike", ["in"], ["noise"], scale=1e-3),
        make_node("Add", ["in", "noise"], ["out"]),
    ]
    return after(graph, nodes(graph, "Relu")[0], new)


@mutant("random")
def dithered_input(case: Case) -> Bad:
    """The random sub-level dither of the training transforms went into the graph."""
    graph = case.folded()
    new = [
        make_node("RandomUniformLike", ["in"], ["dither"], low=0.0, high=1 / 255),
        make_node("Add", ["in", "dither"], ["out"]),
    ]
    return at_input(graph, new)


@mutant("coupled-rows")
def batch_statistics_in_the_graph(case: Case) -> Bad:
    """Batch norm written out by hand, with the mean and variance of the batch at hand."""
    graph = case.kept()
    node = nodes(graph, "BatchNormalization")[-1]
    gamma, beta = node.input[1:3]
    constants(graph, rows=[0], tiny=1e-5)
    new = [
        make_node("ReduceMean", ["in", "rows"], ["mean"]),
        make_node("Sub", ["in", "mean"], ["centred"]),
        make_node("Mul", ["centred", "centred"], ["squares"]),
        make_node("ReduceMean", ["squares", "rows"], ["variance"]),
        make_node("Add", ["variance", "tiny"], ["positive"]),
        make_node("Sqrt", ["positive"], ["deviation"]),
        make_node("Div", ["centred", "deviation"], ["normal"]),
        make_node("Mul", ["normal", gamma], ["scaled"]),
        make_node("Add", ["scaled", beta], ["out"]),
    ]
    return in_place_of(graph, node, new)


@mutant("coupled-rows")
def batch_centred_input(case: Case) -> Bad:
    """The mean image is subtracted: the batch's, not the training set's."""
    graph = constants(case.folded(), rows=[0])
    new = [
        make_node("ReduceMean", ["in", "rows"], ["mean_image"]),
        make_node("Sub", ["in", "mean_image"], ["out"]),
    ]
    return at_input(graph, new)


@mutant("coupled-rows")
def scaled_by_the_batch_maximum(case: Case) -> Bad:
    """x / x.max(), which is 1 for any batch with a white pixel in it."""
    graph = case.kept()
    new = [
        make_node("ReduceMax", ["in"], ["brightest"], keepdims=0),
        make_node("Div", ["in", "brightest"], ["out"]),
    ]
    return at_input(graph, new)


@mutant("coupled-rows")
def another_path_for_single_images(case: Case) -> Bad:
    """An If that takes a shortcut for a batch of one, from a latency optimization long ago."""
    graph = constants(case.kept(), one=1, shift=1e-3)
    same = onnx.helper.make_graph(
        [make_node("Identity", ["raw"], ["many"])],
        "many",
        [],
        [make_tensor_value_info("many", onnx.TensorProto.FLOAT, None)],
    )
    other = onnx.helper.make_graph(
        [make_node("Add", ["raw", "shift"], ["single"])],
        "single",
        [],
        [make_tensor_value_info("single", onnx.TensorProto.FLOAT, None)],
    )
    new = [
        make_node("Shape", ["in"], ["rows"], start=0, end=1),
        make_node("Equal", ["rows", "one"], ["alone"]),
        make_node("If", ["alone"], ["out"], then_branch=other, else_branch=same),
    ]
    return at_output(graph, new)


@mutant("batch-norm-missing")
def layer_norm_in_its_place(case: Case) -> Bad:
    """LayerNormalization of the same width takes the same scale and shift."""
    graph = case.kept()
    node = nodes(graph, "BatchNormalization")[-1]
    node.op_type = "LayerNormalization"
    del node.input[3:]
    del node.attribute[:]
    set_attribute(node, "axis", -1)
    return graph


@mutant("batch-norm-missing", cases=["cnn"])
def instance_norm_in_its_place(case: Case) -> Bad:
    """InstanceNormalization: what batch norm in train mode is for a batch of one image."""
    graph = case.kept()
    node = nodes(graph, "BatchNormalization")[0]
    node.op_type = "InstanceNormalization"
    del node.input[3:]
    del node.attribute[:]
    return graph
