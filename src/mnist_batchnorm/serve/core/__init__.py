"""Serving without a transport.

service: authentication, queue, trace, execution, accounting; catalog, models, control,
shared_state: which models are served; decode, json_documents, tensors, encode: the JSON and
binary codecs; describe, protocol, settings, metrics, log.
"""
