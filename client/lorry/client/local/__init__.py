"""The services of lorry as child processes on this machine."""
