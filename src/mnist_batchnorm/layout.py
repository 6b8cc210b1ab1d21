"""What the pipeline's files are called and where they lie, seen from the folder of dvc.yaml."""

from pathlib import Path

VARIANTS = ("bn", "plain")  # the two networks

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
TEST_SPLIT = PREPARED / "test.safetensors"

MODELS = Path("models")
CHECKPOINT = MODELS / "bn.safetensors"  # what the ONNX files are made from
GRAPHS = {"bn.onnx": False, "bn-folded.onnx": True}  # in models/ -> whether batch norm is folded

REPORTS = Path("reports")

WEIGHTS_KEY = "mnist_batchnorm.weights_sha256"  # in an ONNX file's metadata_props
