"""The same requests to servers in each loading mode, which take turns where memory allows all of them."""

import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from toppings.config import Config, ConfigError
from toppings.lab.http.client import LoadClient
from toppings.lab.http.server import (
    Command,
    free_port,
    run_dir,
    running_server,
    serve_command,
)
from toppings.lab.machine import available_memory_bytes, drop_page_cache
from toppings.lab.modes.comparison import (
    LOADS,
    REFERENCE_MODE,
    ModeResult,
    ModesComparison,
    ModesSpec,
    Survey,
)
from toppings.lab.modes.report import is_prompt_step, read_steps
from toppings.lab.outcome import Outcome
from toppings.lab.players.http import run_load
from toppings.lab.progress import progress_bar, run_to_end
from toppings.lab.summary import LoadSummary, span_s, summarize
from toppings.lab.workload import LoadShape, make_calls
from toppings.sources.models import DEMO

NUM_SURVEY_WARMUP = 10
NUM_SURVEY = 15
SHUTDOWN_S = 1.0
ROUND_REQUESTS = 10
"""Poisson arrivals that one mode's server gets before it is another's turn."""
SETTLE_S = 0.02
"""Between two servers' turns: the threads of the first fall asleep."""
MEMORY_SHARE = 0.7
"""Of the memory that is available, what the servers may take together."""

OnProgress = Callable[[str, int], None]
"""Called with what is going on, and how many more requests are done."""


async def compare_modes(
    spec: ModesSpec, work_dir: Path, on_progress: OnProgress, command: Command = serve_command
) -> ModesComparison:
    """Runs everything; adapters that are made, and the servers' registry, go to the empty `work_dir`.

    Raises ValueError where a server does not start or its requests fail before anything is measured.
    """
    base = await _with_adapters(spec, work_dir, on_progress)
    survey = await _survey(spec, base, work_dir, on_progress, command)
    rps = spec.load.rps or _round(0.5e3 / survey.e2e_ms)
    link_gbps = base.engine.link_gbps
    if spec.load_ratio:
        mean_bytes = survey.used_bytes / len(survey.adapters)
        link_gbps = _round(mean_bytes / (spec.load_ratio * survey.prefill_ms) / 1e6)
    spec = replace(spec, load=replace(spec.load, rps=rps))
    configs = [
        Config.from_settings(_mode_settings(spec, mode, survey, link_gbps), base) for mode in spec.modes
    ]
    is_interleaved = len(configs) > 1 and not spec.one_at_a_time and _fit_memory(configs, survey)
    if is_interleaved:
        configs = [await asyncio.to_thread(_with_state_of_its_own, config) for config in configs]
    groups = [configs] if is_interleaved else [[config] for config in configs]
    results = []
    for group in groups:
        results += await _run_modes(spec, group, survey, on_progress, command)
    return ModesComparison(spec, survey, link_gbps, rps, results, is_interleaved)


def compare_with_progress(spec: ModesSpec, work_dir: Path | None) -> ModesComparison:
    """As `compare_modes`, with a bar; adapters are made in a new directory within `work_dir`."""
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    num_requests = len(spec.modes) * spec.num_requests_per_mode()
    with (
        tempfile.TemporaryDirectory(prefix="toppings-bench-", dir=work_dir) as place,
        progress_bar(total=num_requests) as bar,
    ):
        return run_to_end(compare_modes(spec, Path(place), bar.advance))


def _round(value: float) -> float:
    return float(f"{value:.3g}")


# --- what all servers have in common ---


async def _with_adapters(spec: ModesSpec, work_dir: Path, on_progress: OnProgress) -> Config:
    """The configuration with a registry of its own and adapters; these are made if need be."""
    settings: dict[str, Any] = {
        "state_dir": str(work_dir / "state"),
        "shutdown_timeout_s": SHUTDOWN_S,
        "enable_prefix_caching": "off",  # every mode's every prefill is to compute its whole prompt
        "max_queue": max(spec.base.server.max_queue, spec.load.num_requests),
        "model": spec.base.engine.model or DEMO,
    }
    if not spec.base.server.adapters:
        on_progress("making adapters", 0)
        settings["adapters"] = str(work_dir / "adapters")
        await _make_adapters(spec, settings["adapters"])
    return Config.from_settings(settings, spec.base)


async def _make_adapters(spec: ModesSpec, directory: str) -> None:
    """In a process of its own: making them needs torch, which has no place in a load generator."""
    model = spec.base.engine.model or DEMO
    options = {"model": model, "count": spec.num_adapters, "ranks": spec.ranks, "targets": spec.targets}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "toppings", "synth", "adapters", directory, *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise ValueError(f"adapters could not be made: {lines[-1] if lines else process.returncode}")


def _mode_settings(spec: ModesSpec, mode: str, survey: Survey, link_gbps: float) -> dict[str, Any]:
    """`cached` gets a pool for all adapters, the others for one in `POOL_SHARE`. The host store has room for
    all, or for no more than that pool where adapters are to come from the disk."""
    is_reference = mode == REFERENCE_MODE
    return {
        "mode": mode,
        "port": free_port(),
        "link_gbps": link_gbps,
        "device_pool_bytes": survey.registered_bytes if is_reference else survey.pool_bytes,
        "host_store_bytes": 2 * survey.used_bytes if spec.home == "host" else survey.pool_bytes,
    }


def _with_state_of_its_own(config: Config) -> Config:
    """A copy of what the survey registered: one state directory serves one process."""
    home = f"{config.engine.state_dir}-{config.engine.mode}"
    shutil.copytree(config.engine.state_dir, home)
    return Config.from_settings({"state_dir": home}, config)


def _fit_memory(configs: list[Config], survey: Survey) -> bool:
    """Whether all servers may run at once: on a GPU not, as one server takes what memory it finds there."""
    if any(config.engine.device != "cpu" for config in configs):
        return False
    engines = [config.engine for config in configs]
    wanted = sum(survey.server_bytes + e.device_pool_bytes + e.host_store_bytes for e in engines)
    return wanted < MEMORY_SHARE * available_memory_bytes()


# --- the runs ---


async def _survey(
    spec: ModesSpec, base: Config, work_dir: Path, on_progress: OnProgress, command: Command
) -> Survey:
    """Also registers the adapters, so that later starts find them packed."""
    on_progress("survey", 0)
    settings = {"mode": "on_demand", "port": free_port(), "link_gbps": 0.0, "log_dir": str(work_dir / "logs")}
    config = Config.from_settings(settings, base)
    free_before = available_memory_bytes()
    async with running_server(config, command) as client:
        rows = {row["name"]: row["bytes"] for row in (await client.get("/adapters"))["adapters"]}
        if len(rows) < spec.num_adapters:
            raise ConfigError(
                f"num_adapters is {spec.num_adapters}, but {base.server.adapters} has {len(rows)} usable ones"
            )
        used = sorted(rows)[: spec.num_adapters]
        shape = spec.load.one_after_another(NUM_SURVEY_WARMUP + NUM_SURVEY)
        outcomes = await run_load(client, make_calls(shape, used[:1]), is_sequential=True)
        _require_success(outcomes)
        steps = [step for step in read_steps(run_dir(config) / "steps.jsonl") if is_prompt_step(step)]
        server_bytes = max(0, free_before - available_memory_bytes())
    return Survey(
        {name: rows[name] for name in used},
        sum(rows.values()),
        statistics.median(step.ms - step.load_ms for step in steps[-NUM_SURVEY:]),
        statistics.median(outcome.e2e_ms for outcome in outcomes[-NUM_SURVEY:]),
        server_bytes,
    )


async def _run_modes(
    spec: ModesSpec, configs: list[Config], survey: Survey, on_progress: OnProgress, command: Command
) -> list[ModeResult]:
    """All these servers run at once, but only one of them has requests at a time."""
    async with AsyncExitStack() as stack:
        runs = []
        for config in configs:
            on_progress(f"{config.engine.mode}: starting", 0)
            client = await stack.enter_async_context(running_server(config, command))
            runs.append(_ModeRun(spec, config, list(survey.adapters), client, on_progress))
            await runs[-1].warm_up()
        chance = random.Random(spec.load.seed)
        for kind in LOADS:
            for run in runs:
                await run.begin()
            for shape in _turns(spec.load, kind, is_interleaved=len(runs) > 1):
                for run in chance.sample(runs, len(runs)):
                    await run.take_turn(kind, shape)
            for run in runs:
                await run.end(kind)
    return [run.result() for run in runs]


def _turns(load: LoadShape, kind: str, *, is_interleaved: bool) -> list[LoadShape]:
    """The parts in which a load is sent to each server: single requests, or short rounds of arrivals."""
    whole = load.one_after_another(load.num_requests) if kind == "sequential" else load
    if not is_interleaved:
        return [whole]
    size = 1 if kind == "sequential" else ROUND_REQUESTS
    rest = range(load.num_requests, 0, -size)
    return [replace(whole, num_requests=min(size, num_left)) for num_left in rest]


class _ModeRun:
    """Adapters are used in turn over all loads, so that none comes again before all others have come."""

    def __init__(
        self,
        spec: ModesSpec,
        config: Config,
        adapters: list[str],
        client: LoadClient,
        on_progress: OnProgress,
    ) -> None:
        self._spec = spec
        self._config = config
        self._adapters = adapters
        self._client = client
        self._on_progress = on_progress
        self._num_sent = 0
        self._num_misses_before = 0
        self._loads: dict[str, LoadSummary] = {}
        self._outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
        self._total_s: defaultdict[str, float] = defaultdict(float)

    async def warm_up(self) -> None:
        """With `home` host, a token of each adapter brings it to the host store. Leaves an empty step log."""
        shape = self._spec.load.one_after_another(len(self._adapters))
        if self._spec.home == "host":
            _require_success(await self._run(replace(shape, prompt_tokens=1, max_tokens=1), "preload"))
        if self._spec.num_warmup:
            _require_success(await self._run(shape.one_after_another(self._spec.num_warmup), "warm-up"))
        with suppress(FileNotFoundError):
            os.truncate(run_dir(self._config) / "steps.jsonl", 0)  # the server appends, wherever the end is

    async def begin(self) -> None:
        self._num_misses_before = await self._num_misses()

    async def take_turn(self, kind: str, shape: LoadShape) -> None:
        await asyncio.sleep(SETTLE_S)
        if self._spec.home == "disk":
            await asyncio.to_thread(drop_page_cache, Path(self._config.engine.state_dir))
        outcomes = await self._run(shape, kind)
        self._outcomes[kind] += outcomes
        self._total_s[kind] += span_s(outcomes)

    async def end(self, kind: str) -> None:
        num_cold = await self._num_misses() - self._num_misses_before
        self._loads[kind] = summarize(self._outcomes[kind], total_s=self._total_s[kind], num_cold=num_cold)

    def result(self) -> ModeResult:
        settings = self._config.to_settings()
        del settings["api_key"]
        return ModeResult(self._config.engine.mode, settings, self._loads, dict(self._outcomes))

    async def _run(self, shape: LoadShape, what: str) -> list[Outcome]:
        calls = make_calls(shape, self._adapters, first=self._num_sent)
        self._num_sent += len(calls)
        label = f"{self._config.engine.mode}: {what}"
        self._on_progress(label, 0)
        return await run_load(
            self._client, calls, is_sequential=not shape.rps, on_done=lambda: self._on_progress(label, 1)
        )

    async def _num_misses(self) -> int:
        return int((await self._client.get("/stats"))["counters"]["device_misses"])


def _require_success(outcomes: list[Outcome]) -> None:
    """What fails before the measurement would fail in it."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise ValueError(f"a request for {outcome.adapter} failed in the warm-up: {outcome.error}")
