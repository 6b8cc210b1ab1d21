"""Training.

loop: epochs, evaluation, learning curve; with `trainer` (interface), `fused` (fast step),
  `autograd` (any network), `devices`, `checkpoint` (resume) and `reproducible` (across processors)
worker, processes: one network in a process of its own, and the processes of both
replicas, seeds: both networks from many seeds, and the statistics over them
live: MLflow while training runs
"""
