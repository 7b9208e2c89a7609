"""Many commands at once."""
