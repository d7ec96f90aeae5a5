"""Presets: YAML layers that are merged into a typed RunSpec, with the origin of every value."""
