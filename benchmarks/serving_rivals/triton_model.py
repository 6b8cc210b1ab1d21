"""A model of Triton's Python backend: ONNX Runtime on the file beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Open the file that config.pbtxt names."""
        path = json.loads(args["model_config"])["parameters"]["onnx"]["string_value"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(Path(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Compute the logits of each request."""
        answers = []
        for request in requests:
            images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            (logits,) = self.session.run(["logits"], {"image": images})
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return answers
