"""The `errand-boy` command."""
