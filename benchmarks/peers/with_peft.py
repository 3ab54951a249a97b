"""transformers, and PEFT where there are adapters, as a side of the comparison."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, __version__

from peers.side import Side, Tokens
from toppings.lab.transformers_side import generate
from toppings.ops.product_profile import this_cpu


def main() -> None:
    side = Side()
    job = side.job
    settings = {name: getattr(torch, value) for name, value in job["settings"].items()}
    base, adapted = (AutoModelForCausalLM.from_pretrained(job["model"], **settings) for _ in range(2))
    first, *others = job["adapters"]
    adapted = PeftModel.from_pretrained(adapted, first, Path(first).name)
    for path in others:
        adapted.load_adapter(path, Path(path).name)
    base.eval()
    adapted.eval()

    def answer(prompts: Tokens, num_tokens: int, adapters: Sequence[str] | None) -> Tokens:
        return generate(adapted if adapters else base, prompts, num_tokens, adapters)

    side.serve(answer, version=__version__, cpu=this_cpu())


if __name__ == "__main__":
    main()
