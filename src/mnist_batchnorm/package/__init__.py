"""Folders from which other engines serve the proven models.

write: a package for a target. proven: the models and their evidence, read once.
triton, kserve, mlflow_models: one target each. examples: the README, a request and its answers.
folder: atomic replacement, and the manifest. requirements: pins from requirements.lock.
"""
