"""The report's plots as SVG text: the same numbers give the same bytes.

style: colors, fonts and the two networks' looks; rendering to SVG and PNG.
curves: learning curves, of one run and of many seeds.
diagrams: confusion matrix, reliability diagram, unit statistics, error histogram.
"""
