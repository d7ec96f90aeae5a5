"""Estimate of a training run's peak GPU memory, made from config.json alone before anything starts."""
