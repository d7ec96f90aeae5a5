"""`flashrl eval`."""


def evaluate() -> None:
    """Evaluate checkpoints."""
