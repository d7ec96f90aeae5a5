"""Presets: YAML layers merged into a typed RunSpec, with the origin of every value."""
