"""Several runs of one preset, one for each combination of values."""
