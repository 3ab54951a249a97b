"""Many engines as one Ray Serve application: an HTTP front, engine replicas, and routing by our policies."""
