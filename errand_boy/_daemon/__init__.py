"""The daemon, which starts commands for other users and programs in other languages."""
