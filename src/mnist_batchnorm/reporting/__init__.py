"""The report on one run of the pipeline.

results: gather the files of the earlier stages.
figures: numbers computed from them.
plots: pictures.
page: the HTML page and the model card.
"""
