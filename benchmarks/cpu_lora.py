"""LoRA on CPU cores, one process a core against torch's own threads (toppings.lab.cpu.lora).

    python benchmarks/cpu_lora.py                  # h 4096, q, k and v, rank 64, bf16: a minute
    python benchmarks/cpu_lora.py --toy            # small and short: does the script still work?
    python benchmarks/cpu_lora.py --rank 128 --dtype float32 --json lora.json --figure lora.png

Ends in one JSON line.
"""

import argparse
import json
from pathlib import Path

from toppings.adapters.peft_config import MAX_RANK
from toppings.lab.cpu import lora as cpu_lora
from toppings.lab.figures import new_figure
from toppings.lab.results import check_files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="small and short: checks that it runs")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--figure", type=Path, help="draw curves there (needs matplotlib)")
    options = parser.parse_args()
    if not 1 <= options.rank <= MAX_RANK:
        parser.error(f"--rank is {options.rank}; it must be from 1 to {MAX_RANK}")
    try:
        check_files(options.json, options.figure)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    measured = cpu_lora.measure(rank=options.rank, dtype=options.dtype, is_toy=options.toy, on_line=print)
    if options.figure:
        figure, axes = new_figure(1, width=7)
        cpu_lora.draw(axes[0, 0], measured["times"])
        figure.savefig(options.figure)
    result = {"benchmark": "cpu_lora", **measured}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
