"""MNIST: where it comes from, its IDX files, its splits."""
