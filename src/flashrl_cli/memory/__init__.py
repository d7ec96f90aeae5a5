"""A training run's peak memory on a GPU, estimated before anything starts, from config.json alone."""
