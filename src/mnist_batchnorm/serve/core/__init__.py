"""Serving without a transport: models, requests, metrics, the inference service."""
