"""The training loop, its fast step, checkpoints and replicas."""
