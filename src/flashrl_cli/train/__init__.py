"""From a plan to a supervised run."""
