"""Data sets: raw rows to verl rows, prepared with a manifest."""
