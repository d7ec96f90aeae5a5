"""Child processes that hold an engine for the command line: their protocol, both of its sides, and the factory of vLLM engines."""
