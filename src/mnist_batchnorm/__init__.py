"""A reproducible pipeline that asks whether the model you serve still batch-normalizes."""
