"""Timed steps of an engine in this process, on batches made to order."""
