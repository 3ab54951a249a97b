"""Who asks: tenants with their keys, what each may do, and how much of it. Knows no web framework."""
