"""Quantized checkpoints and smoothing profiles, made offline."""
