"""Processes that work for the command line, and how both sides talk."""
