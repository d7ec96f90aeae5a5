"""Data sets: raw rows are converted to verl rows, and written with a manifest."""
