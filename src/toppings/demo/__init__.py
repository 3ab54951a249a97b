"""What ships with Toppings: a small model with its adapters, made by examples/train_demo.py, and adapters of
the real model that the set-up installs."""

from pathlib import Path

__all__ = ["BASE_NAME", "demo_adapters_dir", "demo_model_dir", "real_adapters_dir"]

BASE_NAME = "toppings-demo"


def demo_model_dir() -> Path:
    return Path(__file__).parent / "model"


def demo_adapters_dir() -> Path:
    """The folder that holds one PEFT adapter folder per name."""
    return Path(__file__).parent / "adapters"


def real_adapters_dir() -> Path | None:
    """The same of the real model; None where there are none. In the sources a link to examples/adapters."""
    directory = Path(__file__).parent / "real_adapters"
    return directory if any(directory.glob("*/adapter_config.json")) else None
