"""Everything that starts one command, waits for it and ends it."""
