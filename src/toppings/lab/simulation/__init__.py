"""Simulated fleets: what they say, and the verbs that ask them."""
