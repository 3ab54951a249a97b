"""Servers without a model, which compute nothing but take the time that a performance model says."""
