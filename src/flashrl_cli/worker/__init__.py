"""Child processes that hold an engine for the command line: protocol, client, server, and the factory of engines."""
