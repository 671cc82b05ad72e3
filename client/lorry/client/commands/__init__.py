"""The commands of `lorry`, a module each."""
