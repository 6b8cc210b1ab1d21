"""The servers that benchmarks/serving.py measures beside this one, each a program of its own.

They run in environments of their own, so none imports anything of this project. NAME.txt lists
what is in the environment, to the version.
"""
