"""Engines in this process, one after another."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toppings.config import EngineConfig
from toppings.engine.build import build_engine
from toppings.engine.engine import Engine


@contextmanager
def running_engine(config: EngineConfig, **parts: Any) -> Iterator[Engine]:
    """Built as `build_engine` builds it and raises; at the end its accounts are checked, and it is closed."""
    engine = build_engine(config, **parts)
    try:
        yield engine
        engine.check_integrity()
    finally:
        engine.close()
