"""How near is a decode step to the bytes that it must read, and what do adapters add to it?

    python benchmarks/gpu/decode_step.py                     # Llama-2-7B's shape, batch 32, context 512
    python benchmarks/gpu/decode_step.py --graphs off        # the same, operator by operator
    python benchmarks/gpu/decode_step.py --form bgmv         # the other decode kernels
    python benchmarks/gpu/decode_step.py --ahead off         # steps begin when the last tokens are known
    python benchmarks/gpu/decode_step.py --toy --device cpu  # does it run? The built-in model

An engine in this process, greedy, all adapters on the device. A step's time is from the last one's tokens to
its own. Cases take turns, so that a drift of the clock hits all alike. The floor of a step: its weights, the
contexts' keys and values and each distinct adapter, all once, over the bandwidth of a copy (bytes read and
written) measured in the same run. Ends in one JSON line. Not yet run on a GPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import Bench, copy_gbps, finish, make_parser, median, note, open_bench, step_bytes

from toppings.adapters.registry import AdapterRecord
from toppings.cluster.batch_row import BatchRow
from toppings.config import DECODE_LORA_FORMS
from toppings.lab.aims import Aim, at_most
from toppings.lab.batches.driver import BatchDriver
from toppings.lab.batches.plan import Rows


@dataclass(frozen=True)
class Case:
    """`batch` sequences, dealt to the adapters of `kind` in turn ("": the base model)."""

    name: str
    batch: int
    kind: str = ""

    def rows(self, adapters: Sequence[AdapterRecord], context: int) -> Rows:
        if not adapters:
            return tuple(BatchRow(0, None, 1, context) for _ in range(self.batch))
        dealt = [adapters[i % len(adapters)] for i in range(self.batch)]
        return tuple(BatchRow(record.rank, record.name, 1, context) for record in dealt)


def time_cases(
    bench: Bench, cases: Sequence[Case], context: int, *, rounds: int, num_steps: int, **settings: Any
) -> tuple[dict[str, float], str]:
    """Median ms of each case's steps, and the form of the decode kernels."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    with bench.engine("cached", **settings) as engine:
        driver = BatchDriver(engine, {record.name: record.adapter_id for record in bench.records})
        for number in range(rounds + 1):  # the first round warms up
            for case in cases:
                rows = case.rows(bench.kinds.get(case.kind, []), context)
                steps = driver.decode_ms(rows, num_steps)
                times[case.name] += steps if number else []
            so_far = {name: median(values) for name, values in times.items() if values}
            note("decode_step", bench.options, context=context, rounds=number, step_ms=so_far)
        form = engine.info.decode_lora_form
    return {name: median(values) for name, values in times.items()}, form


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--graphs", choices=("on", "off"), default="on")
    parser.add_argument("--form", choices=DECODE_LORA_FORMS, default="auto", help="decode kernels of LoRA")
    parser.add_argument("--ahead", choices=("auto", "on", "off"), default="auto", help="async_scheduling")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a case in a round")
    options = parser.parse_args()
    batch, context = options.batch, options.context
    rounds, num_steps = options.rounds, options.steps
    if options.toy:
        batch, context, rounds, num_steps = 4, 20, 1, 4
    few, many = max(1, batch // 4), batch
    cases = [
        Case("base", batch),
        Case(f"{few} of rank 16", batch, "few"),
        Case(f"{many} of rank 64", batch, "many"),
        Case("base, one sequence", 1),
    ]
    with open_bench(options, max_num_seqs=batch) as bench:
        bench.register("few", few, ranks=(16,))
        bench.register("many", many, ranks=(64,))
        settings = {"cuda_graphs": options.graphs, "decode_lora_form": options.form}
        settings |= {"async_scheduling": options.ahead}
        ms, form = time_cases(bench, cases, context, rounds=rounds, num_steps=num_steps, **settings)
        gbps = copy_gbps(options)
        floors = {case.name: floor_ms(bench, case, context, gbps) for case in cases}
    return finish(
        "decode_step",
        options,
        aims_of(cases, ms, floors),
        graphs=options.graphs,
        ahead=options.ahead,
        form=form,
        batch=batch,
        context=context,
        copy_gbps=gbps,
        step_ms=ms,
        floor_ms=floors,
        over_floor={name: ms[name] / floors[name] for name in ms},
        adapters_add={case.name: ms[case.name] / ms["base"] - 1 for case in cases if case.kind},
        floor_of_adapters={case.name: floors[case.name] / floors["base"] - 1 for case in cases if case.kind},
    )


def floor_ms(bench: Bench, case: Case, context: int, gbps: float) -> float:
    adapters = sum(record.num_bytes for record in bench.kinds.get(case.kind, [])[: case.batch])
    return (step_bytes(bench.model, case.batch * context) + adapters) / gbps / 1e6


def aims_of(cases: Sequence[Case], ms: dict[str, float], floors: dict[str, float]) -> list[Aim]:
    base, few, many, one = (case.name for case in cases)
    return [
        at_most("step over its floor, no adapters", ms[base] / floors[base], 1.25),
        at_most(f"{few} adapters on q, k, v: step over one without", ms[few] / ms[base], 1.05),
        at_most(f"{many} adapters on q, k, v: step over one without", ms[many] / ms[base], 1.25),
        at_most("step of one sequence over its floor", ms[one] / floors[one], 1.2),
    ]


if __name__ == "__main__":
    sys.exit(main())
