"""The dashboard of servers and routers: its page, what is fed to it, and what is kept of the last minutes."""
