"""A model server made with KServe's SDK: a ``kserve.Model`` around ONNX Runtime.

    python kserve_app.py --http_port PORT --model_dir MODEL --model_name NAME

The options are the SDK's own, but for the file. It logs each request unless told not to; here it is
told. It listens on every address, which the SDK does not let one choose.
"""

import argparse
import logging
from typing import Any

import numpy as np
import onnxruntime as ort
from kserve import (  # type: ignore[import-not-found]
    InferOutput,
    InferRequest,
    InferResponse,
    Model,
    ModelServer,
    model_server,
)
from kserve.utils.utils import generate_uuid  # type: ignore[import-not-found]


class Network(Model):  # type: ignore[misc]
    """Answers the Open Inference Protocol from an ONNX file."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        """Compute the logits."""
        images = payload.inputs[0].as_numpy()
        (logits,) = self.session.run(["logits"], {"image": images.astype(np.float32, copy=False)})
        output = InferOutput(name="logits", shape=list(logits.shape), datatype="FP32")
        output.set_data_from_numpy(logits, binary_data=bool(payload.use_binary_outputs))
        return InferResponse(
            response_id=payload.id or generate_uuid(),
            model_name=self.name,
            infer_outputs=[output],
            use_binary_outputs=bool(payload.use_binary_outputs),
        )


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(parents=[model_server.parser], conflict_handler="resolve")
    parser.add_argument("--model_dir", required=True)
    options = parser.parse_args()
    server = ModelServer(enable_grpc=False, enable_latency_logging=False)
    logging.disable(logging.INFO)
    server.start([Network(options.model_name, options.model_dir)])


if __name__ == "__main__":
    main()
