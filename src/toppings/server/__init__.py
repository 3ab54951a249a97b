"""The HTTP server: `create_app` makes the application, `run_server` runs it around an engine process."""
