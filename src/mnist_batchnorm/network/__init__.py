"""The lecture's networks, their checkpoints and their ONNX form."""
