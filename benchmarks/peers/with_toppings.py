"""Toppings as a side of the comparison."""

from collections.abc import Sequence
from pathlib import Path

from peers.side import Side, Tokens
from toppings import LLM, SamplingParams
from toppings.ops import dispatch
from toppings.ops.product_profile import this_cpu


def main() -> None:
    side = Side()
    job = side.job
    with LLM(job["model"], state_dir=job["state_dir"], **job["settings"]) as llm:
        for path in job["adapters"]:
            llm.load_adapter(Path(path).name, path)

        def answer(prompts: Tokens, num_tokens: int, adapters: Sequence[str] | None) -> Tokens:
            sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            return [each.token_ids for each in llm.generate(prompts, sampling, adapter=adapters)]

        side.serve(answer, cpu=this_cpu(), kernels_have_bf16=dispatch.has_bf16())


if __name__ == "__main__":
    main()
