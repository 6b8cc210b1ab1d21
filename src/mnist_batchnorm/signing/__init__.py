"""Sign and verify the model files."""
