"""The engines: what they serve, what their steps cost, how they are simulated, and loads played to them."""

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.config import Config, EngineConfig, ServerConfig
from toppings.lab.batches.profile import profile_batches
from toppings.lab.batches.steps import BatchSpec
from toppings.lab.http.apis import CompletionsApi
from toppings.lab.http.client import LoadClient, wait_until_ready
from toppings.lab.http.server import free_port, running_server
from toppings.lab.outcome import Outcome
from toppings.lab.players.http import run_load
from toppings.lab.validation.loads import MEAN_RESPONSE, ValidationLoad
from toppings.lab.workload import calls_of
from toppings.sim.settings import SimConfig
from toppings.sim.trace import IntArray, Trace
from toppings.synth import AdapterShape, ModelShape, write_adapters, write_model

NUM_ENGINES = 2
MAX_NUM_SEQS, CHUNK, MAX_MODEL_LEN = 16, 512, 512
KV_TOKENS = MAX_NUM_SEQS * MAX_MODEL_LEN
POLICY = "rank_aware_residency"
ITEM_BYTES = 2
PUBLISHED = "published"
TIMEOUT_S = 300.0
LOAD = ValidationLoad(
    name="fleet",
    arrivals="poisson",
    popularity="zipf:1.0",
    mode="pipelined",
    utilization=1.0,
    chunk=CHUNK,
)


SHAPE = ModelShape(hidden=512, layers=8, heads=8, kv_heads=8, intermediate=1408, vocab=4000, dtype="bfloat16")
ADAPTERS = AdapterShape()


@dataclass(frozen=True)
class Setting:
    """`slots`: adapters of mean rank that a device holds; `load_ms`: what loading one takes, over an emulated
    link; `profile_s`: for which steps are timed (0: not at all, they are published ones); `attainment`: what
    a plan is to promise; `seeds`: loads that are played with each placement, and `plan_seeds` those that a
    plan rests on.
    """

    shape: ModelShape = SHAPE
    adapters: AdapterShape = ADAPTERS
    num_adapters: int = 48
    slots: int = 6
    load_ms: float = 60.0
    profile_s: float = 30.0
    num_requests: int = 120
    seeds: int = 2
    attainment: float = 0.9
    plan_seeds: int = 6
    placements: tuple[str, ...] = ("none", "static_k", "adaptive")

    @property
    def ranks(self) -> IntArray:
        """Of every adapter, int32 [A]."""
        return np.resize(np.array(self.adapters.ranks, dtype=np.int32), self.num_adapters)

    @property
    def bytes_per_rank(self) -> int:
        """Of an adapter of q, k and v, all as wide as the model."""
        return len(self.adapters.targets) * 2 * self.shape.hidden * self.shape.layers * ITEM_BYTES

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.shape.hidden * self.shape.layers * ITEM_BYTES

    @property
    def mean_bytes(self) -> float:
        return float(self.ranks.mean()) * self.bytes_per_rank

    def trace(self, seed: int, rate: float) -> Trace:
        names = tuple(f"adapter-{i:05d}" for i in range(self.num_adapters))
        return replace(LOAD.make_trace(self.num_requests, rate, self.ranks, seed), names=names)

    def engine(self, model: Path, state_dir: Path) -> EngineConfig:
        return EngineConfig(
            model=str(model),
            state_dir=str(state_dir),
            mode=LOAD.mode,
            num_threads=1,
            enable_prefix_caching="off",  # prompts are played again and again
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=CHUNK,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_bytes=KV_TOKENS * self.kv_token_bytes,
            device_pool_bytes=int(self.slots * self.mean_bytes),
            host_store_bytes=int(2 * self.num_adapters * self.mean_bytes),
            link_gbps=float(f"{self.mean_bytes / self.load_ms / 1e6:.3g}"),
        )

    def simulated(self, model: PerfModel) -> SimConfig:
        """Servers like the engines; whoever simulates them says how they are placed."""
        return SimConfig(
            perf_model=model,
            policy=POLICY,
            num_instances=NUM_ENGINES,
            num_copies=1,
            mode=LOAD.mode,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=CHUNK,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_tokens=KV_TOKENS,
            device_pool_bytes=int(self.slots * self.mean_bytes),
            bytes_per_rank=self.bytes_per_rank,
            num_layers=self.shape.layers,
            response_tokens=float(MEAN_RESPONSE),
        )


@dataclass(frozen=True)
class Home:
    """Where model and adapters are, `steps` what those of a lone engine take, `steps_file` the same."""

    setting: Setting
    path: Path
    steps: PerfModel
    steps_file: str


@contextmanager
def make_home(setting: Setting) -> Iterator[Home]:
    """All that is made is gone afterwards. To be called by the main thread, which times the steps."""
    with tempfile.TemporaryDirectory(prefix="toppings-two-engines-") as directory:
        path, spec = Path(directory), setting.adapters
        write_model(path / "model", setting.shape)
        write_adapters(path / "adapters", path / "model", spec, count=setting.num_adapters)
        config = setting.engine(path / "model", path / "profile")
        steps, steps_file = load_perf_model(PUBLISHED), PUBLISHED
        if setting.profile_s:
            times = BatchSpec(setting.profile_s, spec.ranks, spec.targets)
            profile, steps_file = profile_batches(config, times)
            steps = profile.model
        yield Home(setting, path, replace(steps, link_gbps=config.link_gbps), steps_file)


@asynccontextmanager
async def running_engines(home: Home) -> AsyncIterator[list[str]]:
    """Their URLs."""
    async with AsyncExitStack() as stack:
        urls = []
        for i in range(NUM_ENGINES):
            path = home.path / f"engine-{i}"
            server = ServerConfig(
                port=free_port(),
                adapters=str(home.path / "adapters"),
                log_dir=str(path / "logs"),
                perf_model_file=home.steps_file,
            )
            config = Config(engine=home.setting.engine(home.path / "model", path), server=server)
            urls.append((await stack.enter_async_context(running_server(config))).url)
        yield urls


async def play(urls: Sequence[str], placement: str, slo_tpt_ms: float, trace: Trace) -> list[Outcome]:
    """Through a router of its own. Raises RuntimeError where a request has no whole answer."""
    config = RouterConfig(
        instances=tuple(InstanceConfig(url=url) for url in urls),
        port=0,
        policy=POLICY,
        placement=placement,
        num_copies=1,
        prefix_routing="off",
        slo_tpt_ms=slo_tpt_ms,
        response_tokens=float(MEAN_RESPONSE),
        health_timeout_s=TIMEOUT_S,  # others may be at work on this machine: none of the two is down for that
        first_token_timeout_s=TIMEOUT_S,
        idle_timeout_s=TIMEOUT_S,
        log_level="warning",
    )
    api = CompletionsApi(ignores_eos=True)
    async with running_router(config) as (_, url), LoadClient(url, api, timeout_s=TIMEOUT_S) as client:
        await wait_until_ready(client)
        outcomes = await run_load(client, calls_of(trace), is_sequential=False)
    for outcome, num_tokens in zip(outcomes, trace.response_tokens.tolist(), strict=True):
        if outcome.error is not None or outcome.num_tokens != num_tokens:
            raise RuntimeError(f"an answer of {num_tokens} tokens was asked for; there came {outcome}")
    return outcomes
