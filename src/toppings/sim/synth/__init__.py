"""Generators of load; each is named for what it is, and tested to be that."""
