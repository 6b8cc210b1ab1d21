"""Versions of the models and the rules that decide which is champion.

registration: register the present files.
rules: one function per rule.
measure: the test images that the present files misclassify.
goldens: compare outputs with the pinned ones.
onnx_model: an ONNX file loaded for measuring.
"""
