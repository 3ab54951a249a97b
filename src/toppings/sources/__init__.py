"""Base models and adapters from wherever they are: found, fetched within bounds, made ready to be read."""
