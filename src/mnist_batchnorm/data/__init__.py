"""MNIST: its IDX files (`idx`), its splits (`split`) and their summary (`summary`)."""
