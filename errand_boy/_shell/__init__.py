"""A shell that stays, and runs one command after another."""
