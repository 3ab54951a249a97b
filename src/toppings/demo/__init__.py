"""The demo that ships with Toppings: a small model and its adapters, made by examples/train_demo.py."""

from pathlib import Path

__all__ = ["demo_adapters_dir", "demo_model_dir"]


def demo_model_dir() -> Path:
    return Path(__file__).parent / "model"


def demo_adapters_dir() -> Path:
    """The folder that holds one PEFT adapter folder per name."""
    return Path(__file__).parent / "adapters"
