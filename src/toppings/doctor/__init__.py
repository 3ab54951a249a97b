"""What this machine, a configuration and its state directory can do, and what to change."""
