"""Requests played over HTTP, into an engine of this process, or into its simulation: one way to ask for it.

A player takes a trace, sends each of its requests when its time has come, and tells what became of them, in
their order. How long it took is what its own clock says: the wall's, or a virtual one.
"""

from typing import Protocol

from toppings.lab.outcome import Outcome
from toppings.sim.trace import Trace


class Player(Protocol):
    def play(self, trace: Trace) -> list[Outcome]:
        """Returns when all requests have ended."""
