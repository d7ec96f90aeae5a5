"""The commands: a thin module each, which parses options, calls the core and renders the result."""
