"""Whether a run fits into the GPUs' memory, estimated before anything starts, from config.json alone."""
