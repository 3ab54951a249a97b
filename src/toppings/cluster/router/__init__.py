"""The router: an HTTP reverse proxy that places each request by a policy."""
