"""What `lorry tokens` and `lorry certs` make: the callers of a deployment."""
