"""Jobs, commands of a daemon that outlive their client: the client's side."""
