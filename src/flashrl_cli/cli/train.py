"""`flashrl train`."""


def train() -> None:
    """Train."""
