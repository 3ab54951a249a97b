"""What answers look like, for the OpenAPI document alone: answers are written without them.

A field without a default is always there; one with a default may be left out.
"""
