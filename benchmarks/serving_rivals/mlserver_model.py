"""A runtime of MLServer's for an ONNX file, beside the settings that name it."""

import numpy as np
import onnxruntime as ort
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found]
from mlserver.types import (  # type: ignore[import-not-found]
    InferenceRequest,
    InferenceResponse,
    ResponseOutput,
)


class Network(MLModel):  # type: ignore[misc]
    """Answers the Open Inference Protocol from the ONNX file of its settings."""

    async def load(self) -> bool:
        """Open the file."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.settings.parameters.uri
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Compute the logits."""
        images = NumpyCodec.decode_input(payload.inputs[0])
        (logits,) = self.session.run(["logits"], {"image": images.astype(np.float32, copy=False)})
        output = ResponseOutput(
            name="logits", shape=list(logits.shape), datatype="FP32", data=logits.ravel().tolist()
        )
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
