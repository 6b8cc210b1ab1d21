"""The Open Inference Protocol over HTTP, the page and the docs."""
