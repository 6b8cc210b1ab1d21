"""Does the file say what made it and how to feed it, and nothing of where it was made?"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import Message

from mnist_batchnorm.export import provenance
from mnist_batchnorm.layout import WEIGHTS_KEY
from mnist_batchnorm.model import Checkpoint
from mnist_batchnorm.parity.report import Check, verdict


def check_provenance(proto: onnx.ModelProto, weights: Path, checkpoint: Checkpoint) -> Check:
    """Compare the file's metadata with what the export of the checkpoint writes.

    Args:
        proto: the ONNX model.
        weights: the checkpoint's file.
        checkpoint: its content.
    """
    expected = provenance(weights, checkpoint)
    embedded = {entry.key: entry.value for entry in proto.metadata_props}
    problems = _weights_problems(embedded.get(WEIGHTS_KEY), expected[WEIGHTS_KEY], weights)
    for key in sorted(expected.keys() - {WEIGHTS_KEY}):
        if key not in embedded:
            problems.append(f"{key} is missing")
        elif embedded[key] != expected[key]:
            problems.append(f"{key} is {embedded[key]!r}, expected {expected[key]!r}")
    if unknown := sorted(embedded.keys() - expected.keys()):
        problems.append(f"metadata that export does not write: {', '.join(unknown)}")
    problems += _remark_problems(proto)
    made_from = f"made from this very checkpoint ({expected[WEIGHTS_KEY][:12]})"
    return verdict("provenance", problems, made_from, dict(embedded))


def _weights_problems(claimed: str | None, expected: str, weights: Path) -> list[str]:
    if claimed is None:
        return [f"the file does not say which checkpoint made it ({WEIGHTS_KEY} is missing)"]
    if claimed != expected:
        return [f"made from checkpoint {claimed[:12]}, but {weights} is {expected[:12]}"]
    return []


def _remark_problems(proto: onnx.ModelProto) -> list[str]:
    """Find doc strings, and metadata below the model's own: exporters put paths into both."""
    remarks = Counter(
        f"{field.name} of {part.DESCRIPTOR.name}"
        for part in _parts(proto)
        for field, _ in part.ListFields()
        if field.name == "doc_string" or (field.name == "metadata_props" and part is not proto)
    )
    return [f"{n} x {remark}, which export strips" for remark, n in sorted(remarks.items())]


def undecodable(proto: onnx.ModelProto) -> list[str]:
    """Name the fields whose text is not UTF-8, as ``Message.field``; protobuf lets them pass."""
    found = set()
    for part in _parts(proto):
        for field, value in part.ListFields():
            texts = [value] if isinstance(value, str | bytes) else value
            if field.type == field.TYPE_STRING and any(isinstance(t, bytes) for t in texts):
                found.add(f"{part.DESCRIPTOR.name}.{field.name}")
    return sorted(found)


def _parts(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _parts(part)
