"""The report: figures, plots, page and model card."""
