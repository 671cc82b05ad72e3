"""Studies of the router's policies in the simulator, each a command that writes its result."""
