"""Check ``provenance``: the file's metadata about its origin is correct."""

from collections import Counter
from collections.abc import Mapping

import onnx

from mnist_batchnorm.parity.graph import messages_in
from mnist_batchnorm.parity.report import Check, verdict


def check_provenance(
    proto: onnx.ModelProto, expected: Mapping[str, str], *, required: bool
) -> Check:
    """Compare ``metadata_props`` with the expected keys and values.

    If they are ``required``, all must be present and nothing else: no other key, doc string or
    metadata inside the graph, where exporters leave paths of their machine.
    """
    embedded = {entry.key: entry.value for entry in proto.metadata_props}
    problems = [
        f"{key} is {embedded[key]!r}, expected {expected[key]!r}"
        for key in sorted(expected.keys() & embedded.keys())
        if embedded[key] != expected[key]
    ]
    if len(embedded) != len(proto.metadata_props):
        problems.append("the metadata says something twice")
    missing = sorted(expected.keys() - embedded.keys())
    if required:
        problems += [f"{key} is missing" for key in missing]
        if unknown := sorted(embedded.keys() - expected.keys()):
            problems.append(f"metadata that export does not write: {', '.join(unknown)}")
        problems += _remark_problems(proto)
    correct = len(expected) - len(missing)
    detail = (
        f"all {correct} statements about its origin hold"
        if correct
        else "says nothing of its origin"
    )
    return verdict("provenance", problems, detail, {"embedded": embedded, "missing": missing})


def _remark_problems(proto: onnx.ModelProto) -> list[str]:
    remarks = Counter(
        f"{field.name} of {part.DESCRIPTOR.name}"
        for part in messages_in(proto)
        for field, _ in part.ListFields()
        if field.name == "doc_string" or (field.name == "metadata_props" and part is not proto)
    )
    return [f"{n} x {remark}, which export strips" for remark, n in sorted(remarks.items())]
