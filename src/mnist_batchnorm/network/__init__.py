"""The two networks of the lecture.

model: architecture and checkpoints
frozen: checks of batch norm's running statistics
onnx: export
evaluation: logits, loss, accuracy, calibration, confusion matrix
"""
