"""What git and DVC record about results.

git: commits and experiments that hold a result, and their files.
dvc_lock: parse ``dvc.lock``.
"""
