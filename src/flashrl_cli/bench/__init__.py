"""Throughput, refit time and train/rollout mismatch of rollout precisions."""
