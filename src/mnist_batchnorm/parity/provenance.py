"""Does the file say what made it, and nothing that is not so?"""

from collections import Counter
from collections.abc import Mapping

import onnx

from mnist_batchnorm.parity.graph import parts
from mnist_batchnorm.parity.report import Check, verdict


def check_provenance(
    proto: onnx.ModelProto, expected: Mapping[str, str], *, required: bool
) -> Check:
    """Compare the file's metadata with what its maker should have written there.

    Args:
        proto: the ONNX model.
        expected: keys and values of ``metadata_props``.
        required: whether they must all be there, and nothing else: no other key, no doc string,
            no metadata below the model's own, where exporters leave paths of their machine.
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
    said = len(expected) - len(missing)
    detail = (
        f"all {said} statements about its origin hold" if said else "says nothing of its origin"
    )
    return verdict("provenance", problems, detail, {"embedded": embedded, "missing": missing})


def _remark_problems(proto: onnx.ModelProto) -> list[str]:
    remarks = Counter(
        f"{field.name} of {part.DESCRIPTOR.name}"
        for part in parts(proto)
        for field, _ in part.ListFields()
        if field.name == "doc_string" or (field.name == "metadata_props" and part is not proto)
    )
    return [f"{n} x {remark}, which export strips" for remark, n in sorted(remarks.items())]
