"""The protocol: what frames say, and the connections that carry them."""
