"""Toppings: serve many LoRA adapters of one base model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toppings.llm import LLM as LLM
    from toppings.sampling_params import SamplingParams as SamplingParams
    from toppings.sampling_params import Structure as Structure
    from toppings.sampling_params import StructureKind as StructureKind

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "Structure", "StructureKind", "__version__"]


def __getattr__(name: str) -> Any:
    """Load `LLM` on first use: the command line and the router start without torch."""
    if name == "LLM":
        from toppings.llm import LLM

        return LLM
    if name in ("SamplingParams", "Structure", "StructureKind"):
        from toppings import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module 'toppings' has no attribute {name!r}")
