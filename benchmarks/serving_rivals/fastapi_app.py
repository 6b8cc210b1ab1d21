"""FastAPI with pydantic models for both bodies, ONNX Runtime called in the handler.

    python fastapi_app.py PORT MODEL (async|sync)

``async``: in an ``async def``, on the event loop, which is the faster one for a model this small.
``sync``: in a ``def``, which FastAPI runs in a thread.
"""

import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Request(BaseModel):
    """Images, each 784 pixels in [0, 1]."""

    images: list[list[float]]


class Answer(BaseModel):
    """Ten logits an image."""

    logits: list[list[float]]


def make_app(model: str, kind: str) -> FastAPI:
    """Make the application for an ONNX file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    app = FastAPI()

    def compute(request: Request) -> Answer:
        images = np.array(request.images, dtype=np.float32)
        (logits,) = session.run(["logits"], {"image": images})
        return Answer(logits=logits.tolist())

    if kind == "sync":
        app.post("/predict")(compute)
        return app

    @app.post("/predict")
    async def predict(request: Request) -> Answer:
        return compute(request)

    return app


def main() -> None:
    """Serve."""
    port, model, kind = sys.argv[1:]
    app = make_app(model, kind)
    uvicorn.run(app, host="127.0.0.1", port=int(port), access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
