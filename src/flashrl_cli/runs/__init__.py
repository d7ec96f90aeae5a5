"""What a run leaves on disk: attempts, metrics, checkpoints."""
