"""Where CPU assistance pays, computed from the planner's own cost model for data-centre GPUs.

    python benchmarks/cold_start_map.py --figure map.png --json map.json    # seconds, no GPU
    python benchmarks/cold_start_map.py --toy

For each rank and prompt length: predicted prefill time of `pipelined` and of `auto`, over `cached`. Nothing
here is measured: a device reads its weights at 85 % of its memory bandwidth or computes at 60 % of its peak,
whichever takes longer; a CPU core's rates are those of one AMX core through torch (90 GFLOP/s at rank 8, 600
at rank 256). `toppings profile cold-start` replaces all of it by measurements. Ends in one JSON line.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.assist.cost import CostProfile, CpuCost
from toppings.assist.plan import Comparison, compare
from toppings.lab.figures import new_figure, save
from toppings.lab.script import finish, make_parser, parse

RANKS = (8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024)
NUM_LAYERS, HIDDEN, INTERMEDIATE = 32, 4096, 11008  # Llama-2-7B
TARGETS = {"q, k, v": (1, 1, 1, 0, 0, 0, 0), "all linear": (1,) * 7}
CPU_CORE = CpuCost(fixed_ms=0.002, per_gflop_ms=1.4, per_mweights_ms=0.02, per_mvalues_ms=0.155)


@dataclass(frozen=True)
class Device:
    """Peak bf16 TFLOP/s, memory and pinned host-to-device bandwidth in 10^9 bytes per second."""

    name: str
    peak_tflops: float
    memory_gbps: float
    link_gbps: float


DEVICES = (
    Device("A10, PCIe 4", 125, 600, 24),
    Device("A100-40G, PCIe 4", 312, 1555, 24),
    Device("H100, PCIe 5", 989, 3350, 50),
)


def shapes() -> BaseShapes:
    square, up, down = (HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)
    return BaseShapes(NUM_LAYERS, (square, square, square, square, up, up, down))


def profile(device: Device, num_workers: int) -> CostProfile:
    parameters = sum(num_in * num_out for num_in, num_out in shapes().sizes)

    def layer_ms(tokens: int) -> float:
        read_ms = 2 * parameters / (0.85 * device.memory_gbps) * 1e-6
        return max(read_ms, 2 * parameters * tokens / (0.6 * device.peak_tflops) * 1e-9)

    return CostProfile(
        origin=f"computed for {device.name}",
        link_gbps=device.link_gbps,
        copy_ms=0.01,
        cpu=CPU_CORE,
        layer_ms=tuple((tokens, layer_ms(tokens)) for tokens in (1, *TOKENS)),
        gemm_share=0.85,
        round_trip_ms=0.03,
        session_ms=0.05,
        num_workers=num_workers,
        result_gbps=device.link_gbps,
    )


def point(rank: int, tokens: int, predicted: Comparison) -> dict[str, Any]:
    over = {mode: ms / predicted.cached_ms for mode, ms in predicted.overheads_ms().items()}
    keep = ("on_demand", "pipelined", "cpu_assisted", "cpu_shrink", "auto")
    return {
        "rank": rank,
        "tokens": tokens,
        "cached_ms": round(predicted.cached_ms, 3),
        "over_cached": {mode: round(1 + over[mode], 3) for mode in keep},
        "auto": predicted.plan.describe(),
    }


def run(devices: tuple[Device, ...], num_workers: int) -> list[dict[str, Any]]:
    maps = []
    for device in devices:
        costs = profile(device, num_workers)
        for targets, is_target in TARGETS.items():
            points = []
            for rank in RANKS:
                ranks = [[rank * flag for flag in is_target]] * NUM_LAYERS
                layout = AdapterLayout.build(ranks, shapes(), "bfloat16")
                points += [point(rank, tokens, compare(costs, layout, tokens)) for tokens in TOKENS]
            maps.append({"device": asdict(device), "targets": targets, "points": points})
    return maps


def draw(maps: list[dict[str, Any]], path: Path) -> None:
    """One panel per device and targets; colour: what `auto` saves of the pipelined prefill's overhead."""
    num_columns = len(maps) // len(TARGETS)
    figure, axes = new_figure(num_columns, len(TARGETS), width=13 / num_columns, height=3.5)
    for number, each in enumerate(maps):
        panel = axes[number % len(TARGETS)][number // len(TARGETS)]
        at = {(p["rank"], p["tokens"]): p["over_cached"] for p in each["points"]}
        saved = [[at[r, t]["pipelined"] - at[r, t]["auto"] for t in TOKENS] for r in RANKS]
        image = panel.imshow(saved, origin="lower", cmap="YlGn", vmin=0, vmax=3, aspect="auto")
        for y, rank in enumerate(RANKS):
            for x, tokens in enumerate(TOKENS):
                over = at[rank, tokens]
                text = f"{over['pipelined']:.2f}"
                if over["auto"] < over["pipelined"]:
                    text += f"\n→{over['auto']:.2f}"
                panel.text(x, y, text, ha="center", va="center", fontsize=7)
        panel.set_xticks(range(len(TOKENS)), TOKENS)
        panel.set_yticks(range(len(RANKS)), RANKS)
        panel.set_title(f"{each['device']['name']}: {each['targets']}")
        panel.set_xlabel("prompt tokens")
        panel.set_ylabel("rank")
    figure.colorbar(image, ax=axes, label="saved by the CPU, in cached prefills")
    figure.suptitle(
        "Llama-2-7B, a cold prefill over a cached one: pipelined → auto (where the CPU helps); computed"
    )
    save(figure, path, dpi=75)


def main() -> None:
    parser = make_parser(__doc__, "one device only", figure="the map")
    parser.add_argument("--workers", type=int, default=8, help="CPU cores that assist")
    args = parse(parser)
    maps = run(DEVICES[:1] if args.toy else DEVICES, args.workers)
    if args.figure:
        draw(maps, args.figure)
    finish(args, "cold_start_map", workers=args.workers, maps=maps)


if __name__ == "__main__":
    main()
