"""Rendering of results: tables, live progress, plots."""
