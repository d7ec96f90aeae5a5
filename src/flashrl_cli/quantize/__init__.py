"""Weights in 8 bits on disk: offline W8A8 checkpoints that stock vLLM loads, and the smoothing profiles that help them."""
