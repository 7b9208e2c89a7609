"""The options of commands: names and types, checks and encodings."""
