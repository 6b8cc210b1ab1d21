"""Packages for Triton, KServe and MLflow, from proven files only."""
