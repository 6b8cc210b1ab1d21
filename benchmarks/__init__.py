"""Measurements that are too long for a test; each says how to run it."""
