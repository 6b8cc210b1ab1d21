"""The Open Inference Protocol over gRPC.

service, methods: the calls; protobuf: their messages; shutdown, server: the port.
"""
