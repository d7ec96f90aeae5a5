"""Evaluate checkpoints: find, load, generate, grade, report."""
