"""LoRA on CPU cores, one process a core against torch's own threads (toppings.lab.cpu.lora).

    python benchmarks/cpu_lora.py                  # h 4096, q, k and v, rank 64, bf16: a minute
    python benchmarks/cpu_lora.py --toy            # small and short: does the script still work?
    python benchmarks/cpu_lora.py --rank 128 --dtype float32 --json lora.json --figure lora.png

Ends in one JSON line.
"""

from toppings.adapters.peft_kinds import MAX_RANK
from toppings.lab.cpu import lora as cpu_lora
from toppings.lab.figures import new_figure, save
from toppings.lab.script import finish, make_parser, parse


def main() -> None:
    parser = make_parser(__doc__, "small and short", figure="curves")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parse(parser)
    if not 1 <= options.rank <= MAX_RANK:
        parser.error(f"--rank is {options.rank}; it must be from 1 to {MAX_RANK}")
    measured = cpu_lora.measure(rank=options.rank, dtype=options.dtype, is_toy=options.toy, on_line=print)
    if options.figure:
        figure, axes = new_figure(1, width=7)
        cpu_lora.draw(axes[0, 0], measured["times"])
        save(figure, options.figure)
    finish(options, "cpu_lora", **measured)


if __name__ == "__main__":
    main()
