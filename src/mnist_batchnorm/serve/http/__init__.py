"""The Open Inference Protocol over HTTP, the page and the docs.

app, fast_request, response_batch: inference; routes, openapi: everything else; body, origin_policy:
what a request may be; connection, sockets, server, backlog: uvicorn's with limits.
"""
