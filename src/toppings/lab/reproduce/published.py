"""Values of the publication (Li et al., "Toppings", USENIX ATC 2025) that ours stand beside."""

SLO_RATIO = 1.5
"""Objective for the time per token, as a multiple of the base model's (sections on scheduling)."""

RANKS = (8, 16, 32, 64)
MAX_BATCH = 32
"""Requests that an instance of the published simulation runs at once (its artifact)."""
RESPONSE_TOKENS = 60.0
"""Mean response length of the published simulation (its artifact)."""

SIMULATION_INSTANCES, SIMULATION_RPS, SIMULATION_FUNCTIONS = 60, 340.0, 40_000
SIMULATION_ATTAINMENT = 0.99
SIMULATION_TPT_CUT = {"dlora": 0.22, "random": 0.23, "first_fit": 0.57}
"""By how much mean TPT of the published scheduler is below each policy's (Fig. 19)."""

TESTBED_INSTANCES, TESTBED_ADAPTERS = 8, 512
TESTBED_RATES = (30.0, 40.0, 50.0)
TESTBED_GAIN = {40.0: 0.21, 50.0: 0.26}
"""SLO attainment above that of the other policies, by requests/s (Fig. 18)."""

MODEL_R2 = 0.96
"""Of the performance models, from 7,618 requests at batch 4-32 and ranks 8-64 (Fig. 11)."""

TOP_TENTH_SHARE = (0.70, 0.73)
"""Requests that the most popular tenth of 128, 256 and 512 adapters gets (the artifact's traces)."""

SHARED_MEMORY_MS = 1.0
"""Below this, whatever the number of receivers; sockets grow with it (Fig. 12, right)."""

CPU_SPEEDUP, CPU_SPEEDUP_CORES, CPU_SPEEDUP_TOKENS = 1.4, 16, 256
"""One process per core over PyTorch's own threads (Fig. 17)."""

MODE_RATIOS = {
    "on_demand": {"ttft": 1.82, "tpt": 1.80, "e2e": 1.81},
    "cpu_assisted": {"ttft": 1.06, "tpt": 1.06, "e2e": 1.07},
}
"""Mean latencies over those with cached adapters: rank 64 at 9 requests/s, Llama-2-7B on an A100."""
