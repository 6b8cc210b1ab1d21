"""A client of the Open Inference Protocol for pictures of digits."""
