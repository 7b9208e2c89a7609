"""Signatures and parameters, for type checkers only."""
