"""`flashrl prepare`."""


def prepare() -> None:
    """Prepare data sets."""
