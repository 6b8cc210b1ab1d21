"""The parity gate: does the ONNX file on disk compute what the checkpoint on disk computes?"""

from mnist_batchnorm.parity.gate import GraphReport, check_graph
from mnist_batchnorm.parity.outputs import Reference
from mnist_batchnorm.parity.report import Check

__all__ = ["Check", "GraphReport", "Reference", "check_graph"]
