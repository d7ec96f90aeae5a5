"""Weights in 8 bits on disk: W8A8 checkpoints that stock vLLM loads, and smoothing profiles."""
