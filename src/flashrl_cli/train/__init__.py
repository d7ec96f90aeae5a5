"""From a launch plan to a supervised run."""
