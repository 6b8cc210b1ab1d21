"""Update MLflow to match the files."""
