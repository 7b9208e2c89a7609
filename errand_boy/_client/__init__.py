"""The client of a daemon, its captured runs, and the executor."""
