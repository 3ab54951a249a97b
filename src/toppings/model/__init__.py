"""Base models: a checkpoint's configuration, the reading of its weights, and one decoder for all families."""
