"""The benchmark of rollout precisions: throughput, refit time, and train/rollout mismatch."""
