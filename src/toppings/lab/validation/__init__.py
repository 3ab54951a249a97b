"""The simulator against the engine: the same requests through both, and how far apart they are."""
