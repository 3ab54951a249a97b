"""What a machine does by itself, without an engine."""
