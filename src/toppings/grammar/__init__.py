"""Structured outputs: what a request's output is held to, checked, compiled, and followed token by token.

The library (llguidance) does the parsing; `sandbox/grammars.py` says what it is given. Whoever takes requests
checks a structure in a sandbox (`checker.py`); the engine compiles it once (`compiler.py`) and keeps, for
each request, where its output stands (`guide.py`).
"""


class StructureError(ValueError):
    """A structure cannot be followed; the message says why."""
