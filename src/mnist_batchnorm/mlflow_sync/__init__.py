"""MLflow as a view of the pipeline's files: runs, models and model registry.

uri: where MLflow stores. connection: MLflow imported and connected, its errors in one line.
stage_inputs, run_identity: what a run was trained from. desired: what MLflow should contain.
run_store, artifacts, registry_mirror: create or update runs, files, registered versions.
sync: update all of it, for the workspace or for all commits. up_to_date: whether there is anything
to do. live_child: the process that logs trainings while they run.
"""
