"""Files that are broken, or no ONNX files, or ONNX files of a version that they do not keep to."""

import base64
import gzip
import io

import onnx
import torch
from onnx import numpy_helper

from tests.support.mutants.edit import numbers, put, tensor
from tests.support.mutants.table import Bad, Family
from tests.support.parity_cases import Case

mutant = Family("corruption")
opset = Family("opset")


def content(case: Case) -> bytes:
    return bytes(case.folded().SerializeToString())


@mutant("corrupt-file")
def empty(case: Case) -> Bad:
    """The disk was full."""
    return b""


@mutant("corrupt-file")
def truncated(case: Case) -> Bad:
    """The download broke off half-way."""
    whole = content(case)
    return whole[: len(whole) // 2]


@mutant("corrupt-file")
def last_byte_missing(case: Case) -> Bad:
    """An off-by-one in a chunked upload."""
    return content(case)[:-1]


@mutant("corrupt-file")
def trailing_bytes(case: Case) -> Bad:
    """A block device's zeros up to the next 512 bytes."""
    whole = content(case)
    return whole + bytes(-len(whole) % 512 or 512)


@mutant("corrupt-file")
def trailing_newline(case: Case) -> Bad:
    """A text tool that ends every file with a newline."""
    return content(case) + b"\n"


@mutant("corrupt-file")
def two_files_concatenated(case: Case) -> Bad:
    """A resumed download appended the whole; protobuf merges the two into one graph."""
    return content(case) * 2


@mutant("corrupt-file")
def other_file_appended(case: Case) -> Bad:
    """kept and folded in one file."""
    return content(case) + case.kept().SerializeToString()


@mutant("corrupt-file")
def safetensors(case: Case) -> Bad:
    """The checkpoint under the wrong name."""
    return case.weights.read_bytes()


@mutant("corrupt-file")
def torch_checkpoint(case: Case) -> Bad:
    """torch.save's zip under the wrong name."""
    stream = io.BytesIO()
    torch.save(case.state, stream)
    return stream.getvalue()


@mutant("corrupt-file")
def error_page(case: Case) -> Bad:
    """What a server said in place of the file."""
    return b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"


@mutant("corrupt-file")
def large_file_pointer(case: Case) -> Bad:
    """git lfs was not installed where the repository was cloned."""
    return (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        b"size 108981\n"
    )


@mutant("corrupt-file")
def compressed(case: Case) -> Bad:
    """Content-Encoding: gzip, saved as it came."""
    return gzip.compress(content(case), mtime=0)


@mutant("corrupt-file")
def encoded(case: Case) -> Bad:
    """base64, out of a JSON message."""
    return base64.b64encode(content(case))


@mutant("corrupt-file")
def line_ends_translated(case: Case) -> Bad:
    """A transfer in text mode: every 0A became 0D 0A."""
    return content(case).replace(b"\n", b"\r\n")


@mutant("corrupt-file")
def start_overwritten(case: Case) -> Bad:
    """The first page is zeros: it was never flushed."""
    return bytes(64) + content(case)[64:]


@mutant("zeroed-weights")
def page_of_zeros(case: Case) -> Bad:
    """A page amid the weights was never flushed; the file parses."""
    graph = case.folded()
    stored = tensor(graph, case.largest)
    stored.raw_data = stored.raw_data[:1024] + bytes(4096) + stored.raw_data[5120:]
    return graph


@mutant("corrupt-file")
def tensor_too_short(case: Case) -> Bad:
    """A weight with fewer bytes than its shape needs."""
    graph = case.kept()
    stored = tensor(graph, case.largest)
    stored.raw_data = stored.raw_data[:-4]
    return graph


@mutant("corrupt-file")
def tensor_of_another_type(case: Case) -> Bad:
    """float32 bytes under the label of int32."""
    graph = case.kept()
    tensor(graph, case.largest).data_type = onnx.TensorProto.INT32
    return graph


@mutant("corrupt-file")
def numbers_said_twice(case: Case) -> Bad:
    """A tensor patched in float_data by a tool that left its raw_data: readers disagree."""
    graph = case.kept()
    stored = tensor(graph, f"{case.linear[-1]}.bias")
    stored.float_data.extend(case.earlier[stored.name].tolist())
    return graph


@mutant("corrupt-file")
def name_defined_twice(case: Case) -> Bad:
    """Two tensors of one name, one of them stale: readers disagree which counts."""
    graph = case.kept()
    stale = numpy_helper.from_array(case.earlier[case.largest].numpy(), case.largest)
    graph.graph.initializer.append(stale)
    return graph


@mutant("corrupt-file")
def operator_misspelt(case: Case) -> Bad:
    """One flipped bit in a name."""
    graph = case.folded()
    graph.graph.node[-1].op_type = "Gemo"
    return graph


@mutant("corrupt-file")
def nodes_out_of_order(case: Case) -> Bad:
    """A tool that sorts nodes by name: a node reads what is written after it."""
    graph = case.folded()
    order = list(graph.graph.node)[::-1]
    del graph.graph.node[:]
    graph.graph.node.extend(order)
    return graph


@mutant("corrupt-file")
def weight_of_another_shape(case: Case) -> Bad:
    """Two rows short: the layers do not fit together."""
    graph = case.folded()
    put(graph, case.largest, numbers(graph, case.largest)[:-2])
    return graph


# --- versions -----------------------------------------------------------------------------------


@opset("opset")
def opset_too_low(case: Case) -> Bad:
    """The version edited down for an old runtime, the operators left as they were."""
    graph = case.legacy()
    graph.opset_import[0].version = 6
    return graph


@opset("opset")
def opset_of_the_future(case: Case) -> Bad:
    """A nightly build's."""
    graph = case.kept()
    graph.opset_import[0].version = 99
    return graph


@opset("opset")
def opset_not_declared(case: Case) -> Bad:
    """No operator set at all."""
    graph = case.folded()
    del graph.opset_import[:]
    return graph


@opset("opset")
def ir_of_the_future(case: Case) -> Bad:
    """A file format that no reader knows yet."""
    graph = case.kept()
    graph.ir_version = 99
    return graph


@opset("opset", latent=True)
def two_versions(case: Case) -> Bad:
    """Two models merged: ONNX's operators are imported in two versions."""
    graph = case.kept()
    graph.opset_import.append(onnx.helper.make_opsetid("", 13))
    return graph
