"""The names of errand-boy's classic interface."""
