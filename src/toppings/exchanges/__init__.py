"""What is written down and counted of requests and changes, by servers and routers alike. Knows no web
framework."""
