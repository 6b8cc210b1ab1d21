"""Programs about this repository, not about the networks."""
