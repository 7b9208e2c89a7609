"""The daemon: errand-boy for other users and other languages."""
